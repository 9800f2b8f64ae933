"""Training checkpoints without quantizers: exports as from the Hugging Face folder of the weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest


from megatron_quant.ckpt.storage import MANIFEST
from megatron_quant.models import Pipeline
from tests.dist import checkpoints, plain, saved
from tests.dist.plain import Training
from tests.dist.pool import Ranks
from tests.dist.test_layouts import digests

SIZES = {"num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 32}
CALIBRATED = {"calib_size": 4, "calib_seq_length": 32, "cold_experts": "layer-max"}
CASES = {
    "weights": {"export_quant_cfg": "nvfp4", "weight_only": True},
    "calibrated": {"export_quant_cfg": "fp8", "export_kv_cache_quant": "fp8", **CALIBRATED},
}
VIRTUAL = ((2, 2, 1), Pipeline(2, 2))
RUNS = {
    "stacked": (1, Training(stacked=True, common=False)),
    "apart": (1, Training(beside=True)),
    "virtual": (4, Training(*VIRTUAL, padding=128, beside=True)),
    "virtual_stacked": (4, Training(*VIRTUAL, stacked=True, padding=128)),
}


def quantize_each(
    source: Path, out: Path, runs: Sequence[Path | None], tp: int, ep: int
) -> None:
    """Every case from every run, or from the folder itself where that is None."""
    for run in runs:
        for name, case in CASES.items():
            saved.quantize(
                hf_model_id=str(source),
                megatron_load_path=run,
                export_dir=out / f"{run.name if run else 'hf'}.{name}",
                tp=tp,
                ep=ep,
                **case,
            )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source") / "hf", **SIZES)


@pytest.fixture(scope="module")
def bare(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "hf"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


@pytest.fixture(scope="module")
def runs(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, (world, how) in RUNS.items():
        ranks(world, plain.save_run, source, folder / name, how)
    return folder


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    ranks(4, quantize_each, source, folder, [None], 2, 2)
    return folder


def files_of(export: Path) -> dict[str, str]:
    """The files but for the manifest, which says what the export is made of."""
    return {name: d for name, d in digests(export).items() if name != MANIFEST}


def test_every_way_of_saving(
    runs: Path, bare: Path, exported: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Byte for byte, at another layout, with no weights in the Hugging Face folder."""
    ranks(4, quantize_each, bare, tmp_path, [runs / name for name in RUNS], 2, 2)
    for case in CASES:
        wanted = files_of(exported / f"hf.{case}")
        for name in RUNS:
            assert files_of(tmp_path / f"{name}.{case}") == wanted, (name, case)
