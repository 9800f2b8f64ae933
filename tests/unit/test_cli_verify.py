"""``megatron-quant verify DIR``: its exit status, and the name of the tensor that is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.dist.command import command
from tests.unit import exported

SCALE = "model.layers.0.mlp.experts.1.down_proj.weight_scale"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return exported.export(
        tmp_path / "good", "modelopt", exported.plan("nvfp4"), exported.source_weights()
    )


def test_a_good_export(good: Path) -> None:
    ended = command("verify", str(good))
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.endswith(f"{len(_sources())} tensors, no problem found\n")


def _sources() -> list[str]:
    return [s.name for p in exported.PARAMS for s in p.sources]


def test_against_the_source_shows_errors(good: Path, tmp_path: Path) -> None:
    source = exported.write(tmp_path / "source", exported.source_weights())
    ended = command("verify", str(good), "--against", str(source))
    assert ended.status == 0
    assert "Largest 10 errors" in ended.out
    assert "nvfp4" in ended.out and "0.0" in ended.out


def _nan(tensors: exported.Tensors) -> None:
    tensors[SCALE].view(torch.uint8).view(-1)[0] = 0x7F  # NaN in e4m3


def _lost(tensors: exported.Tensors) -> None:
    del tensors[SCALE]


def _reshaped(tensors: exported.Tensors) -> None:
    tensors[SCALE] = tensors[SCALE][:-1].clone()


@pytest.mark.parametrize("change", [_nan, _lost, _reshaped])
def test_a_bad_tensor_is_named(change: Callable[[exported.Tensors], None], good: Path) -> None:
    exported.edit(good, change)
    ended = command("verify", str(good))
    assert ended.status == 1
    assert ended.err.startswith(f"megatron-quant: error: {good}: {SCALE}: ")
    assert ended.err.count("\n") == 1
    assert f"problem: {SCALE}: " in ended.out


def test_all_problems_are_listed(good: Path) -> None:
    exported.edit(good, lambda tensors: [tensors.pop(n) for n in list(tensors) if "scale" in n])
    ended = command("verify", str(good))
    problems = [line for line in ended.out.splitlines() if line.startswith("problem: ")]
    assert len(problems) > 10
    assert f"(and {len(problems) - 1} more)" in ended.err


def test_an_interrupted_export(good: Path) -> None:
    (good / exported.INDEX).unlink()
    ended = command("verify", str(good))
    assert ended.status == 1
    assert "model.safetensors.index.json is missing; an export without it was" in ended.err


def test_weights_of_another_model(good: Path, tmp_path: Path) -> None:
    weights = exported.source_weights()
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name] = -weights[name]
    source = exported.write(tmp_path / "source", weights)
    ended = command("verify", str(good), "--against", str(source))
    assert ended.status == 1
    assert f"{good}: {name}: relative error 2" in ended.err


@pytest.mark.parametrize("argv", [["/no/such"], ["{good}", "--against", "/no/such"]])
def test_a_directory_that_does_not_exist(argv: list[str], good: Path) -> None:
    ended = command("verify", *(a.format(good=good) for a in argv))
    assert ended.status == 1
    assert ended.err.startswith("megatron-quant: error: /no/such")
    assert "give a" in ended.err
