"""Writing an export: byte-equal at every layout, safe against what stops it."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_quant.ckpt.dialects.base import INPUT_SCALE, SHAPE
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.ckpt.dialects.scheme import PLAIN
from megatron_quant.ckpt.plan.export_plan import ExportPlan
from megatron_quant.ckpt.plan.parts import RankPart, StoredTensor
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.ckpt.plan.sidecars import Companions, companions
from megatron_quant.ckpt.storage.safetensors_header import INDEX
from megatron_quant.ckpt.write.directory import Existing, prepare_directory, publish
from megatron_quant.ckpt.write.encode_part import Produced, produce
from megatron_quant.ckpt.write.exporter import (
    Destination,
    WriteOptions,
    export,
    read_digests,
    stage_documents,
)
from megatron_quant.ckpt.write.manifest import MANIFEST
from megatron_quant.ckpt.write.rank_work import work_of, write_parts
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError, CheckpointError, ExportError, FormatError
from megatron_quant.formats.codec import encode
from megatron_quant.formats.numbers.absmax import tensor_scale
from tests.unit import ckpt_world as world

BESIDE = Companions(documents={"config.json": {"model_type": "qwen3_moe"}})


def producer(layout: str = "tp1", rank: int = 0):
    where = Layout.simulate(*world.LAYOUTS[layout], experts=world.EXPERTS)

    def made(part: RankPart) -> Iterator[Produced]:
        held = world.local(part.param, where, rank)
        return produce(part, held, world.weight_amax(part.param), world.input_amax(part))

    return made


def write_all_ranks(plan: ExportPlan, layout: str, directory: Path) -> None:
    claim = prepare_directory(plan, directory, BESIDE, Existing.REFUSE, world.LAYOUTS[layout][0])
    for rank in reversed(range(world.LAYOUTS[layout][0])):
        write_parts(work_of(plan, rank), producer(layout, rank), directory)
    digests = read_digests(plan.entries, directory, WriteOptions())
    stage_documents(plan, claim, BESIDE, digests)
    publish(claim)
    claim.release()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("recipe", world.RECIPES)
def test_files_are_byte_equal_at_every_layout(recipe, tmp_path):
    for layout in world.LAYOUTS:
        write_all_ranks(world.plan(recipe, layout), layout, tmp_path / layout)
    reference = contents(tmp_path / "tp1")
    assert len(reference) > 3
    for layout in world.LAYOUTS:
        assert contents(tmp_path / layout) == reference, layout


def expected(target: StoredTensor) -> dict[str, torch.Tensor]:
    """What the file tensors of a target hold, encoded from the whole Hugging Face tensor."""
    w, scheme = world.weights()[target.source.name], target.scheme
    fields = {PLAIN: w, SHAPE: torch.tensor(w.shape)}
    if scheme.weights is not None:
        dscale = None
        if scheme.weights.tensor_scale:
            dscale = tensor_scale(world.weight_amax(target.param), scheme.weights)
            if any(entry.name.endswith("weight_global_scale") for entry in target.entries):
                dscale = dscale.reciprocal().reciprocal()  # what readers of a divisor get
        fields |= encode(w, scheme.weights, dscale)
    if scheme.inputs is not None:
        amax = torch.tensor(3.0 + (target.param.layer or 0))
        fields[INPUT_SCALE] = tensor_scale(amax, scheme.inputs)
    pairs = zip(scheme.stored, target.entries, strict=True)
    return {entry.name: stored.to_disk(fields[stored.field]) for stored, entry in pairs}


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


@pytest.mark.parametrize("recipe", world.RECIPES)
def test_safetensors_reads_what_the_whole_tensors_encode_to(recipe, tmp_path):
    plan = world.plan(recipe, "tp2-etp2")
    write_all_ranks(plan, "tp2-etp2", tmp_path)
    found: dict[str, torch.Tensor] = {}
    for file in plan.files:
        found |= load_file(tmp_path / file.name)
        with safe_open(tmp_path / file.name, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    wanted: dict[str, torch.Tensor] = {}
    for target in plan.targets:
        wanted |= expected(target)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert raw(found[name]) == raw(tensor), name


def test_index_config_and_carried_files(tmp_path):
    plan, out = world.plan("nvfp4", "tp1"), tmp_path / "new" / "out"
    tokenizer = tmp_path / "source" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("{}")
    dialect, quant = get_dialect("modelopt"), world.quant("nvfp4", world.model())
    old = {"torch_dtype": "float32", "quantization_config": {"quant_method": "old"}}
    beside = companions({**world.CONFIG, **old}, quant, dialect, torch.bfloat16)
    beside = beside.beside(tokenizer.parent, [tokenizer])
    seen: list[int] = []
    export(plan, Groups(), producer(), Destination(directory=out, companions=beside), seen.append)
    index = json.loads((out / INDEX).read_text())
    assert index == plan.index
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 (the handle is no dict)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == dialect.quantization_config(quant)
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (out / "tokenizer.json").read_text() == "{}"
    assert sum(seen) == plan.bytes_after
    assert len(list(out.iterdir())) == len(plan.files) + 5


def test_unquantized_config_has_no_quantization(tmp_path):
    quant = world.quant("none", world.model())
    beside = companions(world.CONFIG, quant, get_dialect("modelopt"), torch.bfloat16)
    assert beside.documents == {"config.json": {**world.CONFIG, "dtype": "bfloat16"}}


def test_a_directory_that_is_not_empty(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ExportError, match="is not empty; pass --overwrite"):
        export(
            world.plan("fp8", "tp1"),
            Groups(),
            producer(),
            Destination(directory=tmp_path, companions=BESIDE),
        )
    assert contents(tmp_path) == {"mine.txt": b"x"}


def test_a_target_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ExportError, match="out: cannot be used: Not a directory; choose an"):
        export(
            world.plan("fp8", "tp1"),
            Groups(),
            producer(),
            Destination(directory=tmp_path / "out", companions=BESIDE),
        )


def test_overwrite_leaves_no_file_of_the_older_checkpoint(tmp_path):
    older = world.plan("nvfp4", "tp1", max_shard=20_000)
    quant = world.quant("nvfp4", world.model())
    beside = companions(world.CONFIG, quant, get_dialect("modelopt"), torch.bfloat16)
    export(older, Groups(), producer(), Destination(directory=tmp_path / "out", companions=beside))
    (tmp_path / "out" / "mine.txt").write_text("x")
    newer = world.plan("fp8", "tp1")
    export(
        newer,
        Groups(),
        producer(),
        Destination(directory=tmp_path / "out", companions=BESIDE, existing=Existing.REPLACE),
    )
    names = {file.name for file in newer.files} | {INDEX, MANIFEST, "config.json", "mine.txt"}
    assert set(contents(tmp_path / "out")) == names


def test_overwriting_the_source_is_refused(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    beside = Companions(documents={}, carried=(tokenizer,))
    with pytest.raises(ExportError, match="is the source checkpoint"):
        export(
            world.plan("fp8", "tp1"),
            Groups(),
            producer(),
            Destination(directory=tmp_path, companions=beside, existing=Existing.REPLACE),
        )
    assert contents(tmp_path) == {"tokenizer.json": b"{}"}


def test_a_crash_leaves_no_index_beside_new_files(tmp_path):
    plan = world.plan("fp8", "tp1")
    export(plan, Groups(), producer(), Destination(directory=tmp_path, companions=BESIDE))
    claim = prepare_directory(plan, tmp_path, BESIDE, Existing.REPLACE)
    names = set(contents(tmp_path))
    names -= {".megatron_quant_unfinished.json.partial", ".megatron_quant_lock.partial"}
    assert names == {f".{file.name}.partial" for file in plan.files}
    write_parts(work_of(plan, 0), producer(), tmp_path)
    assert all(name.endswith(".partial") for name in contents(tmp_path))
    claim.discard()
    assert contents(tmp_path) == {}


def test_a_failed_commit_leaves_nothing(tmp_path):
    beside = Companions(
        documents={"config.json": {}}, carried=(tmp_path / "gone" / "tokenizer.json",)
    )
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"gone/tokenizer\.json cannot be read: No such file"):
        export(
            world.plan("fp8", "tp1"),
            Groups(),
            producer(),
            Destination(directory=out, companions=beside),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["linear_fc2.weight3", "router.weight", "final_layernorm.weight"])
def test_a_weight_that_is_not_finite(value, name, tmp_path):
    def poisoned(part: RankPart) -> Iterator[Produced]:
        held = world.local(part.param, Layout.simulate(1, 1, 1, 1), 0)
        if part.param.name.endswith(name):
            held.view(-1)[-1] = value
        return produce(part, held, world.weight_amax(part.param), world.input_amax(part))

    with pytest.raises(FormatError, match=r"(experts\.3\.down_proj|gate|norm)\.weight has NaN"):
        export(
            world.plan("nvfp4", "tp1"),
            Groups(),
            poisoned,
            Destination(directory=tmp_path, companions=BESIDE),
        )
    assert contents(tmp_path) == {}


def first_linear(recipe: str) -> tuple[RankPart, torch.Tensor]:
    part = next(p for p in world.plan(recipe, "tp1").parts if p.target.scheme.weights)
    return part, world.local(part.param, Layout.simulate(1, 1, 1, 1), 0)


@pytest.mark.parametrize(
    ("weight", "inputs", "words"),
    [
        (None, 1.0, r"o_proj\.weight have no amax, which fp8 needs"),
        (1.0, None, r"the inputs of .*o_proj have no amax, which fp8 needs"),
        (float("nan"), 1.0, r"amax of the weight .* is nan"),
        (1.0, float("inf"), r"amax of the inputs of .* is inf"),
    ],
)
def test_an_amax_that_is_missing_or_not_finite(weight, inputs, words):
    part, held = first_linear("fp8")
    amaxes = (None if v is None else torch.tensor(v) for v in (weight, inputs))
    with pytest.raises(CalibrationError, match=words):
        list(produce(part, held, *amaxes))


def test_the_smallest_amax_has_a_scale_that_can_be_inverted():
    part, held = first_linear("nvfp4")
    for entry, _, value in produce(part, held * 0, torch.tensor(1e-40), torch.tensor(1.0)):
        if entry.name.endswith("global_scale"):
            assert torch.isfinite(value) and value > 0


def test_a_value_beyond_the_dtype_of_the_export():
    part = world.plan("none", "tp1", dtype=torch.float16).parts[0]
    held = torch.full(part.src.size, 1e6)
    with pytest.raises(FormatError, match=r"exceeds torch\.float16; choose --dtype bf16"):
        list(produce(part, held))


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_found_before_anything_is_encoded(tmp_path):
    def never(part: RankPart) -> Iterator[Produced]:
        raise AssertionError("encoded before the space was claimed")

    words = r"partial: cannot take \d+ bytes: File too large; choose a smaller --max-shard-size"
    with pytest.raises(ExportError, match=words), file_size_limit(10_000):
        export(
            world.plan("nvfp4", "tp1"),
            Groups(),
            never,
            Destination(directory=tmp_path, companions=BESIDE),
        )
    assert contents(tmp_path) == {}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_fills_while_writing(tmp_path):
    plan = world.plan("fp8", "tp1")
    prepare_directory(plan, tmp_path, BESIDE, Existing.REFUSE)
    for path in tmp_path.iterdir():
        path.unlink()
        path.symlink_to("/dev/full")
    with pytest.raises(ExportError, match=r"No space left on device; free some space") as caught:
        write_parts(work_of(plan, 0), producer(), tmp_path)
    assert "partial: cannot be written" in str(caught.value)


def test_ranks_that_do_not_see_the_directory(tmp_path):
    with pytest.raises(ExportError, match="choose another --export-dir, one that all ranks see"):
        write_parts(work_of(world.plan("fp8", "tp1"), 0), producer(), tmp_path)
