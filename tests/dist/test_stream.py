"""``--stream`` writes what the Megatron path writes, byte for byte, at any number of ranks."""

from pathlib import Path

import pytest

from tests.dist import checkpoints
from tests.dist.test_layouts import FORMATS, SCALES, digests, export_all, folder

CASES: list[dict[str, object]] = [
    {"export_quant_cfg": recipe, "export_format": dialect, "algorithm": algorithm}
    for recipe, dialect, algorithm in FORMATS
] + [
    {"export_quant_cfg": recipe, "export_format": dialect, **more, "expert_scales": scales}
    for recipe, dialect, more in [
        ("fp8", "compressed-tensors", {}),
        ("fp8", "compressed-tensors", {"algorithm": "mse"}),
        ("nvfp4", "modelopt", {}),
        ("nvfp4_four_over_six", "modelopt", {}),
        ("nvfp4_experts_only", "compressed-tensors", {"export_kv_cache_quant": "fp8_cast"}),
    ]
    for scales in SCALES
]
CUT = {"fp8_block", "nvfp4", "int4_asym"}
WEIGHT_ONLY = {"fp8", "nvfp4", "nvfp4_four_over_six", "nvfp4_experts_only"}
"""Recipes whose inputs would have to be calibrated."""


def weight_only(case: dict) -> dict:
    return {**case, "weight_only": case["export_quant_cfg"] in WEIGHT_ONLY}


def stream_all(source: Path, out: Path, cases: list[dict]) -> None:
    from megatron_quant.api.options import QuantizeOptions
    from megatron_quant.api.stream import stream
    from megatron_quant.cli.console import Phases, console
    from megatron_quant.dist import Groups

    for case in cases:
        options = QuantizeOptions(
            hf_model_id=str(source), export_dir=out / folder(case), max_shard_size="300KB", **case
        )
        stream(options, Groups(), Phases(console()))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_equal_to_the_live_model_at_any_number_of_ranks(name: str, tmp_path: Path, ranks) -> None:
    source = checkpoints.save(name, tmp_path / "source")
    cases = [weight_only(case) for case in (CASES if name == "qwen3_moe" else CASES[-4:])]
    ranks(1, export_all, source, tmp_path / "live", 1, 1, 1, cases, timeout=600)
    for world in (1, 3):
        ranks(world, stream_all, source, tmp_path / str(world), cases, timeout=600)
        for case in cases:
            streamed = digests(tmp_path / str(world) / folder(case))
            assert streamed == digests(tmp_path / "live" / folder(case)), (world, case)


def test_the_same_bytes_when_tensors_are_cut_into_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.save("qwen3", tmp_path / "source")
    cases = [weight_only(c) for c in CASES if c["export_quant_cfg"] in CUT]
    stream_all(source, tmp_path / "whole", cases)
    monkeypatch.setattr("megatron_quant.stream.split._ELEMENTS", 1 << 10)
    stream_all(source, tmp_path / "cut", cases)
    for case in cases:
        assert digests(tmp_path / "cut" / folder(case)) == digests(
            tmp_path / "whole" / folder(case)
        ), case


def test_fp32_sources_and_other_dtypes(tmp_path: Path, ranks) -> None:
    source = checkpoints.save("llama", tmp_path / "source")
    cases = [{"export_quant_cfg": "int4", "dtype": dtype} for dtype in ("fp16", "fp32")]
    ranks(1, export_all, source, tmp_path / "live", 1, 1, 1, cases)
    stream_all(source, tmp_path / "streamed", cases)
    for case in cases:
        live = digests(tmp_path / "live" / folder(case))
        assert digests(tmp_path / "streamed" / folder(case)) == live
