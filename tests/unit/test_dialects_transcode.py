"""Dialects that share a grid: a checkpoint goes through all of them and comes back bit for bit."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.dist import Groups
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats.spec import CHANNEL, get_format
from megatron_quant.recipes.plan import QuantPlan
from megatron_quant.runs.conversion import ExportOptions, reexport
from tests.dist.command import command
from tests.unit import exported

ATTENTION = "model.layers.0.self_attn"
ROUTES = {
    "int4": ("gptq", "auto-round", "modelopt", "compressed-tensors"),
    "int8_group": ("gptq", "auto-round", "compressed-tensors"),
    "int4_asym": ("awq", "auto-round", "compressed-tensors"),
    "fp8_block": ("fp8", "compressed-tensors"),
    "mxfp8": ("auto-round", "modelopt", "compressed-tensors"),
    "mxfp4": ("auto-round", "compressed-tensors"),
}


class Quiet:
    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: None

    transfer = bar

    def time(self, name: str) -> nullcontext:
        return nullcontext()


def through(start: Path, *dialects: str) -> Path:
    """``start`` written in each dialect in turn; the last one's directory."""
    for step, dialect in enumerate(dialects):
        target = start.parent / f"{step}-{dialect}"
        reexport(
            ExportOptions(source=start, export_dir=target, export_format=dialect), Groups(), Quiet()
        )
        start = target
    return start


def with_groups(choice: str, size: int) -> QuantPlan:
    quant = exported.plan(choice)
    decisions = (
        replace(d, weights=get_format(d.weights.name, size)) if d.weights else d
        for d in quant.decisions
    )
    return QuantPlan("test", tuple(decisions))


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


def same_files(a: Path, b: Path) -> bool:
    ours, theirs = ({n: raw(t) for n, t in exported.read(d).items()} for d in (a, b))
    return ours == theirs


@pytest.mark.parametrize("choice", ROUTES)
def test_round_trip_is_bit_exact(tmp_path, choice):
    weights = exported.source_weights()
    start = exported.export(
        tmp_path / "start", "compressed-tensors", exported.plan(choice), weights
    )
    end = through(start, *ROUTES[choice])
    assert same_files(start, end)
    assert verify(end, exported.write(tmp_path / "source", weights)).problems == ()


def test_the_command_writes_modelopt_where_nothing_is_said(tmp_path):
    quant, weights = exported.plan("int4"), exported.source_weights()
    start = exported.export(tmp_path / "start", "compressed-tensors", quant, weights)
    ended = command("export", str(start), "--export-dir", str(tmp_path / "out"))
    assert ended.status == 0, ended.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "modelopt"
    assert same_files(tmp_path / "out", through(start, "modelopt"))


@pytest.mark.parametrize("size", [32, CHANNEL])
@pytest.mark.parametrize(
    ("choice", "route"), [("int4", ("gptq", "auto-round")), ("int4_asym", ("awq", "auto-round"))]
)
def test_group_sizes_round_trip(tmp_path, choice, route, size):
    quant = with_groups(choice, size)
    start = exported.export(
        tmp_path / "start", "compressed-tensors", quant, exported.source_weights()
    )
    assert same_files(start, through(start, *route, "compressed-tensors"))


def test_scales_in_fp16_stay_fp16(tmp_path):
    """Those of another producer, which bf16 does not hold."""
    plan = exported.plan("int4")
    start = exported.export(tmp_path / "start", "gptq", plan, exported.source_weights())

    def refine(tensors: exported.Tensors) -> None:
        for name in (n for n in tensors if n.endswith(".scales")):
            tensors[name] = tensors[name].half() * 1.0009765625

    exported.edit(start, refine)
    middle = through(start, "compressed-tensors")
    scale = exported.read(middle)[f"{ATTENTION}.o_proj.weight_scale"]
    assert scale.dtype == torch.float16 and verify(middle).problems == ()
    assert same_files(start, through(middle, "auto-round", "gptq"))
    weight = f"{ATTENTION}.o_proj.weight"
    read = [QuantizedCheckpoint(d).weight(weight, torch.float32) for d in (start, middle)]
    assert torch.equal(*read)


def test_scales_that_would_be_rounded_are_refused(tmp_path):
    plan = exported.plan("int4")
    start = exported.export(tmp_path / "start", "modelopt", plan, exported.source_weights())
    exported.edit(start, lambda t: t[f"{ATTENTION}.o_proj.weight_scale"].mul_(1.0001))
    with pytest.raises(CheckpointError, match=r"o_proj\.weight_scale would be torch\.bfloat16"):
        through(start, "compressed-tensors")


def test_a_scale_that_the_source_lacks(tmp_path):
    plan = exported.plan("w4a8")
    start = exported.export(
        tmp_path / "start", "compressed-tensors", plan, exported.source_weights()
    )
    with pytest.raises(CheckpointError, match=r"nothing to make .*weight_scale_2 of"):
        through(start, "modelopt")


def test_w4a8_drops_what_the_other_dialect_has_not(tmp_path):
    plan = exported.plan("w4a8")
    weights = exported.source_weights()
    start = exported.export(tmp_path / "start", "modelopt", plan, weights)
    wanted = exported.export(tmp_path / "wanted", "compressed-tensors", plan, weights)
    assert same_files(wanted, through(start, "compressed-tensors"))


def test_formats_without_the_other_dialect(tmp_path):
    plan = exported.plan("nvfp4")
    start = exported.export(tmp_path / "start", "modelopt", plan, exported.source_weights())
    with pytest.raises(FormatError, match="gptq export has no nvfp4 weights"):
        through(start, "gptq")


def test_scales_of_the_kv_cache_are_carried_over(tmp_path):
    quant = replace(exported.plan("fp8"), kv_cache="fp8")
    start = exported.export(tmp_path / "start", "modelopt", quant, exported.source_weights())
    names = [f"{ATTENTION}.{p}_proj.{p}_scale" for p in "kv"]
    scales = {name: torch.tensor(0.25 + i) for i, name in enumerate(names)}
    exported.edit(start, lambda t: t.update(scales))
    middle = through(start, "compressed-tensors")
    found = exported.read(middle)
    assert [found[f"{ATTENTION}.{p}_scale"].tolist() for p in "kv"] == [[0.25], [1.25]]
    assert verify(middle).problems == ()
    assert same_files(start, through(middle, "modelopt"))
