"""``--stream`` writes what the Megatron path writes, byte for byte, at any number of ranks."""

from pathlib import Path

import pytest
import torch

from tests.dist import checkpoints, packed
from tests.dist.command import quantize_argv, refused, spoiled
from tests.dist.test_keep_scales import ROUTES, made, stored
from tests.dist.test_layouts import FORMATS, SCALES, digests, export_all, folder
from tests.unit import exported, hf_models, sources

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
    for case in cases:
        stream_case(source, out / folder(case), {**case, "max_shard_size": "300KB"})


@pytest.mark.parametrize(("name", "worlds"), [("qwen3_moe", [3]), ("mixtral", [1, 2]), ("gpt_oss", [2])])
def test_equal_to_the_live_model_at_any_number_of_ranks(
    name: str, worlds: list[int], tmp_path: Path, ranks
) -> None:
    source = checkpoints.save(name, tmp_path / "source")
    cases = [weight_only(case) for case in (CASES if name == "qwen3_moe" else CASES[-4:])]
    ranks(1, export_all, source, tmp_path / "live", 1, 1, 1, cases, timeout=600)
    for world in worlds:
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
    monkeypatch.setattr("megatron_quant.streaming.part_split._ELEMENTS", 1 << 10)
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


def weights_of(directory: Path) -> dict[str, str]:
    return {n: found for n, found in digests(directory).items() if n.endswith(".safetensors")}


def test_a_packed_source_gives_what_it_gives_a_live_model(tmp_path: Path, ranks) -> None:
    """GPTQ with permuted columns, two widths, zero points and a packed router."""
    source, _ = packed.save(tmp_path)
    cases = [weight_only(c) for c in (CASES[0], CASES[2], CASES[-3])]
    ranks(1, export_all, source, tmp_path / "live", 1, 1, 1, cases)
    ranks(3, stream_all, source, tmp_path / "streamed", cases)
    for case in cases:
        live = digests(tmp_path / "live" / folder(case))
        assert live == digests(tmp_path / "streamed" / folder(case)), case


@pytest.mark.parametrize("route", [0, 3, 4, 5, 6])
def test_kept_scales_are_the_sources(route: int, tmp_path: Path, ranks) -> None:
    """From the first dialect to the last and back, as through a model."""
    dialect, choice, recipe, through = ROUTES[route]
    source = given = made(tmp_path / "source", dialect, choice)
    for step, to in enumerate(through):
        case = {"export_quant_cfg": recipe, "export_format": to, "keep_scales": True}
        case |= {"weight_only": recipe != "fp8_block"}
        ranks(2, stream_case, given, tmp_path / str(step), case)
        given = tmp_path / str(step)
    assert stored(given) == stored(source)


def test_what_a_stream_cannot_keep(tmp_path: Path, ranks) -> None:
    flags = {"stream": True, "tp": None, "ep": None, "keep_scales": True}
    dense = checkpoints.save("qwen3", tmp_path / "dense")
    said = refused(ranks, tmp_path, quantize_argv(dense, tmp_path / "out", **flags))
    assert said == f"{dense} has no scales to keep; leave out --keep-scales"
    source = made(tmp_path / "source", "modelopt", "nvfp4 weights")
    name = "model.layers.0.self_attn.k_proj.weight_scale_2"
    exported.edit(source, lambda tensors: tensors[name].mul_(2))
    argv = quantize_argv(source, tmp_path / "out", export_quant_cfg="w4a16_nvfp4", **flags)
    assert "engines would use one for both" in refused(ranks, tmp_path, argv)


@pytest.mark.parametrize("recipe", ["w4a16_nvfp4", "mxfp4"])
def test_gpt_oss_as_it_is_released(recipe: str, tmp_path: Path, ranks) -> None:
    """Stacks in MXFP4 give what their values in bf16, which holds them, give."""
    dense, released = hf_models.save_gpt_oss(tmp_path)
    case = {"export_quant_cfg": recipe, "export_format": "compressed-tensors"}
    for source in (dense, released):
        ranks(2, stream_case, source, tmp_path / f"{source.name}-out", case)
    found = weights_of(tmp_path / "released-out")
    assert found and found == weights_of(tmp_path / "dense-out")


def test_ranks_share_the_calibration_data(tmp_path: Path, ranks) -> None:
    source = hf_models.save("gemma4", tmp_path / "source")
    data = {"calib_dataset": __file__, "calib_size": 7, "calib_batch_size": 1}
    case = {"export_quant_cfg": "nvfp4_mlp_only", "cold_experts": "layer-max"}
    case |= {"calib_seq_length": 16, **data}
    for world in (1, 2):
        kept = {"save_calibration": tmp_path / f"{world}.safetensors"}
        ranks(world, stream_case, source, tmp_path / str(world), case | kept)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    kept = [(tmp_path / f"{world}.safetensors").read_bytes() for world in (1, 2)]
    assert kept[0] == kept[1]


def stream_case(source: Path, out: Path, case: dict) -> None:
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.runs.file_to_file import stream_files as stream
    from megatron_quant.cli.console import ConsolePhases, console
    from megatron_quant.dist import Groups

    options = QuantizeOptions.from_flags(hf_model_id=str(source), export_dir=out, **case)
    stream(options, Groups(), ConsolePhases(console()))


def test_one_ranks_error_is_every_ranks_and_leaves_nothing(tmp_path: Path, ranks) -> None:
    source = checkpoints.save("qwen3", tmp_path / "source")
    name = "model.layers.1.mlp.down_proj.weight"
    bad = spoiled(source, tmp_path / "bad", name, torch.nan)
    argv = quantize_argv(bad, tmp_path / "out", stream=True, tp=None, ep=None)
    assert f"{name} has NaN or Inf" in refused(ranks, tmp_path, argv, world=3)
    argv = quantize_argv(source, tmp_path / "out", stream=True, ep=None)
    assert "--tp 2 does not go with --stream" in refused(ranks, tmp_path, argv)
    argv = quantize_argv(source, source, stream=True, tp=None, ep=None)
    assert "is the source checkpoint" in refused(ranks, tmp_path, argv)


def test_layers_for_speculation_and_another_head_come_through_megatron(
    tmp_path: Path, ranks
) -> None:
    """None of them is in a Megatron model built from config.json alone."""
    source = checkpoints.save("deepseek_v3", tmp_path / "source", num_hidden_layers=3)
    beyond = "model.layers.2."
    found = sources.tensors(source)
    bias = found[f"{beyond}mlp.gate.e_score_correction_bias"]
    sources.write(source, {**found, f"{beyond}eh_proj.weight": torch.ones(128, 256).bfloat16()})
    sources.config(
        source, num_hidden_layers=2, num_nextn_predict_layers=1, tie_word_embeddings=True
    )
    case = {"export_quant_cfg": "int8_group", "export_format": "compressed-tensors"}
    ranks(1, export_all, source, tmp_path / "live", 1, 1, 1, [case])
    ranks(4, export_all, source, tmp_path / "cut", 2, 2, 1, [case])
    stream_all(source, tmp_path / "streamed", [case])
    at = folder(case)
    streamed = digests(tmp_path / "streamed" / at)
    assert digests(tmp_path / "live" / at) == digests(tmp_path / "cut" / at) == streamed
    out = sources.tensors(tmp_path / "cut" / at)
    assert torch.equal(out["lm_head.weight"], found["lm_head.weight"])
    assert out[f"{beyond}eh_proj.weight"].sum() == 128 * 256
    assert torch.equal(out[f"{beyond}mlp.gate.e_score_correction_bias"], bias)
    config = sources.config(tmp_path / "cut" / at)
    assert (config["num_nextn_predict_layers"], config["tie_word_embeddings"]) == (1, False)
