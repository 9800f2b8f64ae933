"""vLLM's own model classes take every tensor of every family's exports, and fill every parameter.

Classes are built and filled on the CPU; no kernel runs. A tensor that a class skips in silence, a
parameter that stays as it was, and codes that are cast to another type are seen (watch.py).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit import sources
from tests.vllm import accepted
from tests.vllm.accepted import KINDS, STACKS
from tests.vllm.engine import NEEDED

pytestmark = NEEDED


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    return accepted.exported(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def found(exports: dict[str, Path | str]) -> dict[str, dict[str, Any]]:
    return accepted.loaded(accepted.written(exports))


def test_the_page_says_what_each_class_takes(
    exports: dict[str, Path | str], found: dict[str, dict[str, Any]]
) -> None:
    assert accepted.page(exports, found) in accepted.PAGE.read_text()


def test_gpt_oss_takes_stacks_of_mxfp4(found: dict[str, dict[str, Any]]) -> None:
    assert accepted.wrong("gpt_oss", STACKS, found[f"gpt_oss/{STACKS.title}"]) == []


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An expert of another name."""
    return {n.replace("experts.1.", "experts.one."): t for n, t in tensors.items()}


def without_a_scale(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if not n.endswith("o_proj.weight_scale")}


def dense_codes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A linear that is not quantized, and that no list says so of."""
    del tensors["model.layers.0.self_attn.o_proj.weight_scale"]
    name = "model.layers.0.self_attn.o_proj.weight"
    return tensors | {name: tensors[name].to(torch.bfloat16)}


def quantized_router(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "model.layers.1.mlp.gate.weight"
    return tensors | {name: tensors[name].to(torch.float8_e4m3fn)}


MISTAKES: dict[str, Any] = {
    "renamed": (renamed, "experts.one.down_proj"),
    "without_a_scale": (without_a_scale, "o_proj.weight_scale is not filled"),
    "dense_codes": (dense_codes, "o_proj.weight: torch.bfloat16 into torch.float8_e4m3fn"),
    "quantized_router": (quantized_router, "gate.weight: torch.float8_e4m3fn into torch.float32"),
}


def test_mistakes_are_seen(exports: dict[str, Path | str], tmp_path: Path) -> None:
    right = exports[f"glm4_moe/{KINDS[0].title}"]
    assert isinstance(right, Path)
    for name, (change, _) in MISTAKES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((right / "config.json").read_text())
        sources.write(tmp_path / name, change(sources.tensors(right)))
    found = accepted.loaded({name: tmp_path / name for name in MISTAKES})
    for name, (_, words) in MISTAKES.items():
        said = accepted.wrong("glm4_moe", KINDS[0], found[name])
        assert words in "\n".join(said), (name, said)
