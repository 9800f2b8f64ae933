"""Whole runs on one GPU: export bytes, ranks that share it, and the demo's comparison."""

from pathlib import Path

import pytest
import torch

from megatron_quant.evaluation import decoded
from tests.dist import checkpoints
from tests.gpu import runs

RECIPES = pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "w4a16_nvfp4", "int4"])
CALIBRATED = ("--calib-size", "8", "--calib-seq-length", "48", "--cold-experts", "layer-max")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("moe"))


def weight_only(recipe: str) -> tuple[str, ...]:
    # An fp8 checkpoint in ModelOpt's dialect always states input scales.
    dialect = "compressed-tensors" if recipe == "fp8" else "modelopt"
    return ("--export-quant-cfg", recipe, "--weight-only", "--export-format", dialect)


@RECIPES
def test_an_export_from_the_gpu_is_the_cpus(moe: Path, tmp_path: Path, recipe: str) -> None:
    on_gpu = runs.quantize(moe, tmp_path / "gpu", *weight_only(recipe))
    on_cpu = runs.quantize(moe, tmp_path / "cpu", *weight_only(recipe), environment=runs.NO_GPU)
    assert runs.digests(on_gpu) == runs.digests(on_cpu)


def test_two_ranks_share_a_gpu_over_gloo(moe: Path, tmp_path: Path) -> None:
    options = weight_only("nvfp4")
    one = runs.quantize(moe, tmp_path / "one", *options)
    two = runs.quantize(moe, tmp_path / "two", *options, "--ep", "2", entry=runs.TORCHRUN)
    assert runs.digests(two) == runs.digests(one)


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_a_calibrated_run_reads_back(moe: Path, tmp_path: Path, recipe: str) -> None:
    """Logits of what was exported stay near those of the source; input scales are there."""
    options = ("--export-quant-cfg", recipe, *CALIBRATED)
    out = runs.quantize(moe, tmp_path / recipe, *options)
    ids = torch.arange(48) * 11 % 250
    plain = decoded(moe, torch.bfloat16)(ids).float()
    found = decoded(out, torch.bfloat16)(ids).float()
    change = (found - plain).norm() / plain.norm()
    assert 0.001 < change < 0.5, change
