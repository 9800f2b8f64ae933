"""Architectures with shared experts, on every path: layouts, pipelines, streams, saved models."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_quant.errors import CheckpointError
from tests.dist import checkpoints, saved
from tests.dist.pool import Ranks
from tests.dist.test_layouts import PATIENCE_S, assert_agree, digests, folder, tensors
from tests.dist.test_pipeline import VIRTUAL
from tests.dist.test_stream import stream_all, stream_case

# Inner sizes that end inside 128 x 128 blocks where tp and etp cut them.
SIZES = {
    "deepseek_v3": {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 192,
        "moe_intermediate_size": 192,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    "qwen2_moe": {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 192,
        "moe_intermediate_size": 192,
        "shared_expert_intermediate_size": 192,
        "num_experts": 4,
        "mlp_only_layers": [1],
    },
}
CASES = [
    {"export_quant_cfg": "nvfp4_mse", "expert_scales": "per_expert", "weight_only": True},
    {
        "export_quant_cfg": "fp8",
        "export_format": "compressed-tensors",
        "algorithm": "mse",
        "weight_only": True,
    },
    {"export_quant_cfg": "fp8_block", "export_format": "fp8"},
]
CALIBRATED = {
    "export_quant_cfg": "nvfp4",
    "cold_experts": "layer-max",
    "calib_size": 8,
    "calib_seq_length": 32,
    "dtype": "fp32",  # no token is routed otherwise by rounding
    "export_kv_cache_quant": "fp8_cast",
}
# (ranks, flags)
LAYOUTS = [
    (4, {"tp": 2, "ep": 2, "etp": 2}),
    (4, {"pp": 2, "tp": 2, "ep": 2, VIRTUAL: 2}),
]


def export_all(source: Path, out: Path, flags: dict, cases: list[dict]) -> None:
    for case in cases:
        saved.quantize(
            hf_model_id=str(source),
            export_dir=out / folder(case),
            max_shard_size="300KB",
            **flags,
            **case,
        )


@pytest.fixture(scope="module", params=list(SIZES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = request.param
    return checkpoints.save(name, tmp_path_factory.mktemp(name), **SIZES[name])


@pytest.fixture(scope="module")
def one(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """Every case of one rank."""
    out = tmp_path_factory.mktemp("one")
    ranks(1, export_all, source, out, {}, [*CASES, CALIBRATED], timeout=PATIENCE_S)
    return out


@pytest.mark.parametrize(("world", "flags"), LAYOUTS)
def test_layouts(
    world: int, flags: dict, source: Path, one: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Weights are byte-equal; scales of inputs, which come from forwards, agree to rounding."""
    args = (source, tmp_path, flags, [*CASES, CALIBRATED])
    ranks(world, export_all, *args, timeout=PATIENCE_S)
    for case in CASES:
        assert digests(tmp_path / folder(case)) == digests(one / folder(case)), case
    found, expected = (tensors(d / folder(CALIBRATED)) for d in (tmp_path, one))
    assert_agree(found, expected)


def test_streams(source: Path, one: Path, tmp_path: Path, ranks: Ranks) -> None:
    ranks(2, stream_all, source, tmp_path, CASES, timeout=PATIENCE_S)
    for case in CASES:
        assert digests(tmp_path / folder(case)) == digests(one / folder(case)), case


def test_saved_by_megatron(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    ranks(2, saved.quantize_all, source, tmp_path / "two", [2, 2, 1], {"case": CASES[0]})
    ranks(1, saved.load_all, tmp_path / "two", tmp_path / "one", [1, 1, 1], {"case": "modelopt"})
    assert digests(tmp_path / "one" / "case") == digests(tmp_path / "two" / "case")


def test_kept_scales_that_engines_fuse_must_be_equal(tmp_path: Path, ranks: Ranks) -> None:
    sizes = {**SIZES["deepseek_v3"], "num_hidden_layers": 2}
    source = checkpoints.save("deepseek_v3", tmp_path / "source", **sizes)
    case = {"export_quant_cfg": "w4a16_nvfp4"}
    stream_case(source, tmp_path / "packed", case)
    stored = tmp_path / "packed" / "model.safetensors"
    weights = load_file(stored)
    weights["model.layers.1.self_attn.q_a_proj.weight_scale_2"] *= 2
    save_file(weights, stored, metadata={"format": "pt"})
    kept, said = {**case, "keep_scales": True}, r"kv_a_proj_with_mqa and .*\.q_a_proj have tensor"
    (error,) = ranks.errors(1, export_all, tmp_path / "packed", tmp_path / "out", {}, [kept])
    assert isinstance(error, CheckpointError) and re.search(said, str(error))
    with pytest.raises(CheckpointError, match=said):
        stream_case(tmp_path / "packed", tmp_path / "streamed", kept)
