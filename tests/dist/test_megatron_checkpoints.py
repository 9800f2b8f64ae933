"""Megatron's distributed checkpoints: one layout saves, and every other loads the same model."""

from pathlib import Path

import pytest
import torch

from tests.dist import checkpoints, saved
from tests.dist.command import command, quantize_argv
from tests.dist.pool import Ranks
from tests.dist.test_layouts import PATIENCE_S, digests, same_bytes

# One layer whose inner sizes end inside groups of 128 and inside 128 x 128 blocks, of the experts
# at etp 4 and of attention at tp 2 and 4.
SIZES = {"moe_intermediate_size": 352, "num_hidden_layers": 1, "num_experts": 4, "head_dim": 24}
SAVED_AT = (2, 2, 2, 1)
# (ranks, tp, ep, etp)
LAYOUTS = [(4, 1, 4, 1), (4, 4, 1, 4), (1, 1, 1, 1)]
MODELOPT = {"export_format": "modelopt"}
COMPRESSED = {"export_format": "compressed-tensors"}
CALIBRATED = {"calib_size": 4, "calib_seq_length": 32, "cold_experts": "layer-max"}
CASES = {
    "fp8": {"export_quant_cfg": "fp8", "export_kv_cache_quant": "fp8", **CALIBRATED, **MODELOPT},
    "fp8_apart": {
        "export_quant_cfg": "fp8",
        "weight_only": True,
        "algorithm": "mse",
        "expert_scales": "per_expert",
        **COMPRESSED,
    },
    "nvfp4": {
        "export_quant_cfg": "nvfp4",
        "expert_scales": "per_expert",
        **CALIBRATED,
        **MODELOPT,
    },
    "nvfp4_mse": {
        "export_quant_cfg": "nvfp4_mse",
        "weight_only": True,
        "expert_scales": "per_expert",
        **MODELOPT,
    },
    "int4": {"export_quant_cfg": "int4", "export_format": "gptq"},
    "fp8_block_mse": {"export_quant_cfg": "fp8_block", "algorithm": "mse", **COMPRESSED},
    "int8": {"export_quant_cfg": "int8", **COMPRESSED},
}
SAVED_AGAIN = ("fp8_apart", "fp8_block_mse")
VOCAB = 258  # padded to a multiple of tp
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def first(source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """Every case quantized at one layout: ``CASE`` is its export, ``CASE.saved`` the checkpoint."""
    out = tmp_path_factory.mktemp("first")
    world, *sizes = SAVED_AT
    ranks(world, saved.quantize_all, source, out, sizes, CASES, timeout=PATIENCE_S)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_the_same(
    layout: tuple[int, ...], first: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """The same exports; and what a loaded model saves again has the same tensors."""
    world, *sizes = layout
    dialects = {name: case["export_format"] for name, case in CASES.items()}
    args = (first, tmp_path, sizes, dialects, SAVED_AGAIN)
    ranks(world, saved.load_all, *args, timeout=PATIENCE_S)
    for name in CASES:
        assert digests(tmp_path / name) == digests(first / name), name
    for name in SAVED_AGAIN:
        old, new = (saved.tensors(d / f"{name}.saved") for d in (first, tmp_path))
        assert old.keys() == new.keys()
        for found in (old, new):
            found |= {key: found[key][:VOCAB] for key in PADDED}
        assert [key for key in old if not same_bytes(old[key], new[key])] == []


def test_what_is_in_it(first: Path) -> None:
    """Keys and shapes, which are of logical tensors."""
    layer, experts = "decoder.layers.0", "decoder.layers.0.mlp.experts.experts"
    shapes = {k: tuple(t.shape) for k, t in saved.tensors(first / "fp8.saved").items()}
    quantizers = {k: v for k, v in shapes.items() if "_quantizer." in k}
    assert quantizers == {
        f"{module}.{name}._amax": (1,)
        for module in (
            f"{layer}.self_attention.linear_qkv",
            f"{layer}.self_attention.linear_proj",
            f"{experts}.linear_fc1",
            f"{experts}.linear_fc2",
        )
        for name in ("weight_quantizer", "input_quantizer")
    } | {
        f"{layer}.self_attention.core_attention.{part}_bmm_quantizer._amax": shapes[
            f"{layer}.self_attention.core_attention.{part}_bmm_quantizer._amax"
        ]
        for part in "kv"
    }
    shapes = {k: tuple(t.shape) for k, t in saved.tensors(first / "fp8_block_mse.saved").items()}
    # gate and up of 352 rows have 3 rows of blocks each, and 128 columns one
    assert shapes[f"{experts}.3.linear_fc1.weight_quantizer._block_amax"] == (6, 1, 1)
    assert shapes[f"{experts}.3.linear_fc2.weight_quantizer._block_amax"] == (1, 3, 1)
    # q of 192 rows has 2, k and v of 96 rows one each
    qkv = f"{layer}.self_attention.linear_qkv.weight_quantizer._block_amax"
    assert shapes[qkv] == (4, 1, 1)
    apart = saved.tensors(first / "fp8_apart.saved")
    assert apart[f"{experts}.3.linear_fc1.weight_quantizer._amax"].shape == (1,)
    assert not any("_extra_state" in key for key in apart)


@pytest.mark.parametrize(
    ("singleton", "case", "tp"), [(True, "nvfp4_mse", 2), (False, "fp8_block_mse", 4)]
)
def test_as_a_training_run_saves_it(
    singleton: bool, case: str, tp: int, first: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Of the model's own sharded_state_dict, ``_extra_state`` included; at tp x etp."""
    held = ranks(tp, saved.save_as_training_does, first / f"{case}.saved", tmp_path, singleton)
    for key, count in saved.written(held).items():
        assert torch.equal(count, torch.ones_like(count)), key
    (tmp_path / "iter_0000007").rename(tmp_path / "run")
    ranks(2, saved.load_all, tmp_path, tmp_path / "out", [1, 1, 1], {"run": CASES[case]["export_format"]})
    assert digests(tmp_path / "out" / "run") == digests(first / case)


def test_scales_convert_both_ways(source: Path, first: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Into those of a model that was quantized so, searched ones too."""
    direct = {"nvfp4_mse": {**CASES["nvfp4_mse"], "expert_scales": "shared"}}
    ranks(2, saved.quantize_all, source, tmp_path, [2, 2, 1], direct, timeout=PATIENCE_S)
    for name, case in direct.items():
        for scales, there, wanted in (
            ("shared", first, tmp_path),
            ("per_expert", tmp_path, first),
        ):
            out = tmp_path / f"{name}.{scales}"
            argv = ["export", "--megatron-load-path", str(there / f"{name}.saved")]
            argv += ["--export-dir", str(out), "--export-format", case["export_format"]]
            for ended in ranks(2, command, *argv, "--expert-scales", scales, "--ep", "2"):
                assert ended.status == 0, ended.err
            assert digests(out) == digests(wanted / name) != digests(there / name)


def test_a_dense_model(tmp_path: Path, ranks: Ranks) -> None:
    """Its gate and up rows, and their grids."""
    source = checkpoints.save("qwen3", tmp_path / "source", num_hidden_layers=1, head_dim=24)
    cases = {name: CASES[name] for name in ("nvfp4_mse", "fp8_block_mse")}
    ranks(2, saved.quantize_all, source, tmp_path / "two", [2, 1, 1], cases)
    dialects = {name: case["export_format"] for name, case in cases.items()}
    ranks(1, saved.load_all, tmp_path / "two", tmp_path / "one", [1, 1, 1], dialects)
    for name in cases:
        assert digests(tmp_path / "one" / name) == digests(tmp_path / "two" / name)


def test_quantize_loads_too(source: Path, first: Path, tmp_path: Path, ranks: Ranks) -> None:
    """With the model's files from elsewhere and its own recipe; input scales are as saved."""
    flags = {**CASES["fp8"], "megatron_load_path": first / "fp8.saved"}
    argv = quantize_argv(source, tmp_path / "out", **{**flags, "ep": 1, "weight_only": None})
    for ended in ranks(2, command, *argv):
        assert ended.status == 0, ended.err
    assert digests(tmp_path / "out") == digests(first / "fp8")


def test_pipelines(tmp_path: Path, ranks: Ranks) -> None:
    """Saved by one rank, loaded by two stages, each of two virtual ones; and the other way round."""
    source = checkpoints.save(
        "qwen3_moe", tmp_path / "source", **{**SIZES, "num_hidden_layers": 4}, mlp_only_layers=[3]
    )
    case = {**CASES["nvfp4_mse"], "expert_scales": "shared"}
    ranks(1, saved.quantize_all, source, tmp_path, [1, 1, 1], {"one": case})
    stages = {**case, "pp": 2, "num_virtual_stages_per_pipeline_rank": 2}
    ranks(2, saved.quantize_all, source, tmp_path, [1, 1, 1], {"two": stages})
    one, two = (saved.tensors(tmp_path / f"{name}.saved") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(same_bytes(one[k], two[k]) for k in one.keys() - {"megatron_quant.description"})
    argv = ["export", "--megatron-load-path", str(tmp_path / "one.saved"), "--pp", "2"]
    argv += ["--num-virtual-stages-per-pipeline-rank", "2", "--expert-scales", "per_expert"]
    argv += ["--export-dir", str(tmp_path / "out"), "--export-format", "modelopt"]
    for ended in ranks(2, command, *argv):
        assert ended.status == 0, ended.err
    apart = {"apart": CASES["nvfp4_mse"]}
    ranks(1, saved.quantize_all, source, tmp_path, [1, 1, 1], apart)
    assert digests(tmp_path / "out") == digests(tmp_path / "apart")
