"""Layers that are measured behind those that gptq has rounded (--stream --sequential)."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from transformers import AutoModel

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import verify
from megatron_quant.errors import CalibrationError, QuantError
from megatron_quant.models import whole
from megatron_quant.runs.batches import calibration_batches
from megatron_quant.streaming import stages
from tests.dist import checkpoints
from tests.unit import hf_models
from tests.unit.test_stream_inputs import options, run
from tests.unit.test_stream_layers import contents
from tests.unit.test_stream_sums import killed, resumed

FLAGS: dict[str, Any] = {
    "export_quant_cfg": "nvfp4",
    "algorithm": "gptq",
    "calib_size": 6,
    "calib_batch_size": 1,
    "keep_hessians": True,
    "sequential": True,
}


MIXED = """
description: Both.
rules:
  - {quantize: ["*self_attn*"], weights: {format: int4, group_size: 128}, algorithm: gptq}
  - {quantize: ["*mlp*"], weights: {format: int4, group_size: 128}, algorithm: awq}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def measured(source: Path, tmp_path_factory) -> Path:
    """A folder with an export and what was kept."""
    folder = tmp_path_factory.mktemp("measured")
    run(source, folder / "out", save_calibration=folder / "kept.safetensors", **FLAGS)
    return folder


def behind_the_export(source: Path, export: Path) -> dict[str, torch.Tensor]:
    """Products of the inputs of layer 1's attention, with layer 0 as the export has it."""
    model = AutoModel.from_pretrained(source, dtype=torch.bfloat16, experts_implementation="eager")
    stored = QuantizedCheckpoint(export)

    def decoded(name: str) -> torch.Tensor:
        info = stored.info(f"model.layers.0.{name}.weight")
        assert info is not None
        return stored.read(f"model.layers.0.{name}.weight", whole(info.shape)).bfloat16()

    with torch.no_grad():
        layer = model.layers[0]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.self_attn.get_submodule(name).weight.copy_(decoded(f"self_attn.{name}"))
        for e in range(8):
            pair = [decoded(f"mlp.experts.{e}.{name}") for name in ("gate_proj", "up_proj")]
            layer.mlp.experts.gate_up_proj[e].copy_(torch.cat(pair))
            layer.mlp.experts.down_proj[e].copy_(decoded(f"mlp.experts.{e}.down_proj"))
    found: dict[str, torch.Tensor] = {}

    def add(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            wide = args[0].reshape(-1, args[0].shape[-1]).double()
            found[name] = found.get(name, 0) + wide.T @ wide

        return hook

    for name in ("q_proj", "o_proj"):
        module = model.layers[1].self_attn.get_submodule(name)
        module.register_forward_pre_hook(add(f"model.layers.1.self_attn.{name}.input_moment"))
    chosen = options(source, source, **{**FLAGS, "keep_hessians": False}).calibration
    with torch.no_grad():
        for batch in calibration_batches(chosen, source, 1 << 20):
            model(input_ids=batch, use_cache=False)
    return found


def test_inputs_are_those_behind_the_rounded_layers(
    source: Path, measured: Path, tmp_path: Path
) -> None:
    kept = load_file(measured / "kept.safetensors")
    hand = behind_the_export(source, measured / "out")
    assert len(hand) == 2
    for name, want in hand.items():
        assert (kept[name].double() - want).norm() < 1e-5 * want.norm(), name
    plain = tmp_path / "kept.safetensors"
    run(source, tmp_path / "out", save_calibration=plain, **{**FLAGS, "sequential": False})
    once = load_file(plain)
    for name, value in once.items():
        if ".layers.0." in name and "amax" not in name:
            assert torch.equal(kept[name], value), name
    for name, want in hand.items():
        assert (once[name].double() - want).norm() > 1e-3 * want.norm(), name
    assert verify(measured / "out", source).problems == ()


def dies(source: Path, folder: Path) -> None:
    killed(source, folder, 1, 8, **FLAGS)


def goes_on(source: Path, folder: Path) -> None:
    resumed(source, folder, **FLAGS)


def test_a_killed_walk_goes_on_to_the_same_bytes(
    source: Path, measured: Path, tmp_path: Path, ranks
) -> None:
    """Layer 0 has run twice when the run dies in layer 1."""
    died = ranks.errors(1, dies, source, tmp_path, timeout=60)
    assert str(died[0]) == "the process died"
    ranks(1, goes_on, source, tmp_path)
    assert contents(tmp_path) == contents(measured)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma4", "deepseek_v3"])
def test_stacks_of_experts(name: str, tmp_path: Path) -> None:
    source = hf_models.save(name, tmp_path / "source")
    flags = {**FLAGS, "export_quant_cfg": "w4a16_nvfp4", "keep_hessians": False, "calib_size": 16}
    run(source, tmp_path / "out", **flags)
    assert verify(tmp_path / "out", source).problems == ()
    run(source, tmp_path / "once", **{**flags, "sequential": False})
    ours, other = (contents(tmp_path / n)["model.safetensors"] for n in ("out", "once"))
    assert ours != other


def on_ranks(source: Path, folder: Path, **changes: Any) -> None:
    run(source, folder / "out", save_calibration=folder / "kept.safetensors", **FLAGS | changes)


def stops(source: Path, folder: Path, at: int, stop: Callable[[], None]) -> None:
    """Rank 1 stops when it has run layers over batches ``at`` times."""
    run_layer, left = stages.Call.run, at

    def counted(*args: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0 and torch.distributed.get_rank() == 1:
            stop()
        return run_layer(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Call, "run", counted)
        on_ranks(source, folder)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise CalibrationError("rank 1 has a reason")


@pytest.fixture(scope="module")
def by_two(source: Path, tmp_path_factory, ranks) -> Path:
    """A folder with an export of two ranks."""
    folder = tmp_path_factory.mktemp("by_two")
    ranks(2, on_ranks, source, folder)
    return folder


def test_ranks_share_the_text_and_the_rounding(source: Path, by_two: Path, measured: Path) -> None:
    kept, alone = (load_file(folder / "kept.safetensors") for folder in (by_two, measured))
    for name, want in behind_the_export(source, by_two / "out").items():
        assert (kept[name].double() - want).norm() < 1e-5 * want.norm(), name
    first = [name for name in alone if ".layers.0." in name and name.endswith(".input_moment")]
    assert len(first) == 18
    for name in first:
        assert (kept[name] - alone[name]).norm() < 1e-5 * alone[name].norm(), name
    assert verify(by_two / "out", source).problems == ()


def test_a_rank_without_text_rounds_too(source: Path, tmp_path: Path, ranks) -> None:
    """So its sums are zeros, and the bytes those of one process."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    on_ranks(source, tmp_path / "one", calib_size=1)
    ranks(2, one_sample, source, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def one_sample(source: Path, folder: Path) -> None:
    on_ranks(source, folder, calib_size=1)


@pytest.mark.parametrize("at", [1, 4, 7], ids=["measuring", "behind the rounded", "a layer later"])
def test_a_rank_that_dies_goes_on_to_the_same_bytes(
    at: int, source: Path, by_two: Path, tmp_path: Path, ranks
) -> None:
    """The other rank may have come a layer further."""
    died = ranks.errors(2, stops, source, tmp_path, at, die, timeout=60)
    assert str(died[1]) == "the process died"
    ranks(2, goes_on, source, tmp_path)
    assert contents(tmp_path) == contents(by_two)


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_rank_that_fails_tells_the_others(at: int, source: Path, tmp_path: Path, ranks) -> None:
    errors = ranks.errors(2, stops, source, tmp_path, at, fail, timeout=60)
    assert [str(error) for error in errors] == ["rank 1 has a reason"] * 2
    assert not any(tmp_path.iterdir())


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    without = {**FLAGS, "keep_hessians": False, "algorithm": "imatrix"}
    with pytest.raises(QuantError, match="--sequential: inputs behind quantized layers are meas"):
        run(source, tmp_path / "out", **without)
    mixed = tmp_path.parent / "mixed.yaml"
    mixed.write_text(MIXED)
    both = {**FLAGS, "keep_hessians": False, "algorithm": None, "export_quant_cfg": str(mixed)}
    with pytest.raises(QuantError, match="--sequential: factors of awq and smoothquant are found"):
        run(source, tmp_path / "out", **both)
    with pytest.raises(QuantError, match="--sequential says what is measured, but --load-calib"):
        run(
            source,
            tmp_path / "out",
            load_calibration=tmp_path / "x",
            **{**FLAGS, "keep_hessians": False},
        )
    assert not any(tmp_path.iterdir())
