"""The promise: whatever the layout, the exported files are the same, byte for byte."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.dist import checkpoints

# (ranks, tp, ep, etp)
LAYOUTS = [
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (4, 4, 1, 1),
    (4, 1, 4, 1),
    (4, 2, 2, 1),
    (8, 2, 4, 1),
    (4, 2, 2, 2),
    (2, 1, 1, 2),
]
# Each kind of cut once, for what all formats share.
FEW = [(8, 2, 4, 1), (4, 2, 2, 2), (4, 4, 1, 1)]
RECIPES = ["fp8", "w4a16_nvfp4", "int4"]
SCALES = ["shared", "per_expert"]
PATIENCE_S = 600.0  # many runs in one call
# (recipe, dialect, algorithm); what these quantize of inputs is dynamic, and needs no data.
FORMATS = [
    ("fp8_channel", "compressed-tensors", "max"),
    ("fp8_block", "fp8", "mse"),
    ("int8", "compressed-tensors", "max"),
    ("int4", "gptq", "max"),
    ("int4", "auto-round", "mse"),
    ("int4_asym", "awq", "max"),
    ("int4_asym", "compressed-tensors", "mse"),
    ("int8_group", "compressed-tensors", "max"),
    ("mxfp8", "modelopt", "max"),
    ("mxfp4", "compressed-tensors", "max"),
]


def export_all(source: Path, out: Path, tp: int, ep: int, etp: int, cases: list[dict]) -> None:
    """Every case (options of a run) at one layout, each into its own folder of ``out``."""
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.runs.megatron import quantize_run as quantize
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.mcore.model.parallel import start_distributed

    groups = start_distributed()
    for case in cases:
        options = QuantizeOptions.from_flags(
            hf_model_id=str(source),
            export_dir=out / folder(case),
            tp=tp,
            ep=ep,
            etp=etp,
            calib_size=16,
            calib_seq_length=48,
            calib_batch_size=2,
            max_shard_size="300KB",
            **case,
        )
        quantize(options, groups, ConsolePhases(console()))


def folder(case: dict) -> str:
    return "-".join(map(str, case.values()))


def digests(directory: Path) -> dict[str, str]:
    return {
        p.name: hashlib.blake2b(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())
    }


def weight_only_cases() -> list[dict]:
    # An fp8 checkpoint in ModelOpt's dialect always states input scales.
    return [
        {
            "export_quant_cfg": recipe,
            "expert_scales": scales,
            "weight_only": True,
            "export_format": "compressed-tensors" if recipe == "fp8" else "modelopt",
        }
        for recipe in RECIPES
        for scales in SCALES
    ]


def format_cases() -> list[dict]:
    """Every other format, dialect and algorithm."""
    cases = [
        {"export_quant_cfg": recipe, "export_format": dialect, "algorithm": algorithm}
        for recipe, dialect, algorithm in FORMATS
    ]
    cases += [
        {"export_quant_cfg": recipe, "expert_scales": scales, "weight_only": True}
        for recipe in ("nvfp4_mse", "nvfp4_four_over_six")
        for scales in SCALES
    ]
    fp8 = {"export_quant_cfg": "fp8", "weight_only": True, "algorithm": "mse"}
    fp8["export_format"] = "compressed-tensors"
    return cases + [fp8 | {"expert_scales": scales} for scales in SCALES]


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


def test_weight_only_exports_are_byte_equal(qwen3_moe: Path, tmp_path: Path, ranks) -> None:
    assert_byte_equal(qwen3_moe, tmp_path, ranks, LAYOUTS, weight_only_cases())


def test_every_format_and_algorithm_is_byte_equal(qwen3_moe: Path, tmp_path: Path, ranks) -> None:
    assert_byte_equal(qwen3_moe, tmp_path, ranks, FEW, format_cases())


def assert_byte_equal(
    source: Path, out: Path, ranks, layouts: list[tuple[int, ...]], cases: list[dict]
) -> None:
    ranks(1, export_all, source, out / "one", 1, 1, 1, cases, timeout=PATIENCE_S)
    expected = {folder(c): digests(out / "one" / folder(c)) for c in cases}
    assert all(len(files) > 6 for files in expected.values()), "several shards are wanted"
    for world, *sizes in layouts:
        directory = out / "-".join(map(str, (world, *sizes)))
        ranks(world, export_all, source, directory, *sizes, cases, timeout=PATIENCE_S)
        for case in cases:
            assert digests(directory / folder(case)) == expected[folder(case)], (sizes, case)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def test_calibrated_exports_agree(qwen3_moe: Path, tmp_path: Path, ranks) -> None:
    """Weights and their scales are byte-equal; input scales, which come from a bf16 forward whose
    last bits depend on the layout, agree to 2%."""
    cases = [
        {"export_quant_cfg": recipe, "expert_scales": scales, "cold_experts": "layer-max"}
        for recipe in ("fp8", "nvfp4")
        for scales in SCALES
    ]
    assert_all_agree(qwen3_moe, tmp_path, ranks, LAYOUTS, cases)


def test_other_calibrated_exports_agree(qwen3_moe: Path, tmp_path: Path, ranks) -> None:
    cases = [
        {
            "export_quant_cfg": recipe,
            "export_format": dialect,
            "cold_experts": "layer-max",
        }
        for recipe, dialect in (("w4a8", "compressed-tensors"), ("w4a8", "modelopt"))
    ]
    cases.append({"export_quant_cfg": "fp8", "act_percentile": 99.0, "cold_experts": "layer-max"})
    assert_all_agree(qwen3_moe, tmp_path, ranks, FEW, cases)


def assert_all_agree(
    source: Path, out: Path, ranks, layouts: list[tuple[int, ...]], cases: list[dict]
) -> None:
    ranks(1, export_all, source, out / "one", 1, 1, 1, cases, timeout=PATIENCE_S)
    for world, *sizes in layouts:
        directory = out / "-".join(map(str, (world, *sizes)))
        ranks(world, export_all, source, directory, *sizes, cases, timeout=PATIENCE_S)
        for case in cases:
            found, expected = (tensors(d / folder(case)) for d in (directory, out / "one"))
            assert_agree(found, expected)


def assert_agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(name.endswith("input_scale") for name in found)
    for name, tensor in expected.items():
        if name.endswith("input_scale"):
            torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=0)
        else:
            assert same_bytes(found[name], tensor), name


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe", "gpt_oss", "qwen3", "llama"])
def test_other_architectures(name: str, tmp_path: Path, ranks) -> None:
    source = checkpoints.save(name, tmp_path / "source")
    cases = [{"export_quant_cfg": r, "weight_only": True} for r in ("nvfp4", "int4")]
    ranks(1, export_all, source, tmp_path / "one", 1, 1, 1, cases)
    ep = 1 if name in ("qwen3", "llama") else 2
    ranks(4, export_all, source, tmp_path / "four", 2, ep, 1, cases)
    for case in cases:
        files = digests(tmp_path / "four" / folder(case))
        assert files == digests(tmp_path / "one" / folder(case))
