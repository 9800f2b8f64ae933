"""Flags that change a recipe, and what planning refuses, from config.json alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_quant.errors import (
    CalibrationError,
    ExportError,
    FormatError,
    QuantError,
    RecipeError,
)
from megatron_quant.runs.job import Job, prepare_job
from megatron_quant.runs.options import QuantizeOptions

from . import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("config")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 384}
    config = {**tiny.config("qwen3_moe"), **sizes, "num_attention_heads": 8, "head_dim": 32}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def job(source: Path, recipe: str, **flags: Any) -> Job:
    flags = {"export_format": "compressed-tensors", **flags}
    return prepare_job(
        QuantizeOptions.from_flags(hf_model_id=str(source), export_quant_cfg=recipe, **flags), 1
    )


def options(source: Path, **flags: Any) -> QuantizeOptions:
    return QuantizeOptions.from_flags(hf_model_id=str(source), export_quant_cfg="int4", **flags)


def test_algorithm_replaces_the_recipes(source: Path) -> None:
    chosen = job(source, "nvfp4_four_over_six", algorithm="mse")
    assert {d.algorithm for d in chosen.quant.quantized} == {"mse"}
    assert {d.algorithm for d in job(source, "nvfp4_mse").quant.quantized} == {"mse"}
    with pytest.raises(RecipeError, match="algorithm mse does not search the scales of mxfp4"):
        job(source, "mxfp4", algorithm="mse")


def test_second_moments_are_planned(source: Path) -> None:
    """qkv 256, proj 256, fc1 256, fc2 384 columns; four experts on two ranks each; two layers."""
    flags = {"algorithm": "gptq", "ep": 2, "tp": 2}
    attention, up, down = 2 * 4 * 256**2, 2 * 4 * 256**2, 2 * 4 * 384**2
    all_at_once = prepare_job(options(source, **flags), 2).moments
    assert [one.nbytes for one in all_at_once] == [2 * (attention + up + down)]
    few = prepare_job(options(source, **flags, calib_memory=f"{down}B"), 2).moments
    assert [one.modules[0].rpartition(".")[2] for one in few][:2] == ["linear_fc2", "linear_fc1"]
    assert [one.nbytes for one in few] == [down, up + attention, down, up + attention]
    assert [m for one in few for m in one.modules] == list(all_at_once[0].modules)
    with pytest.raises(CalibrationError, match=r"decoder.layers.1.mlp.experts.linear_fc2 take 117"):
        prepare_job(options(source, **flags, calib_memory="1MB"), 2)
    with pytest.raises(ExportError, match="--calib-memory 'much' is no size: write it as 5GB"):
        options(source, calib_memory="much")
    assert job(source, "int4").moments == ()
    weights, both = (job(source, r, algorithm="gptq").moments for r in ("w4a16_nvfp4", "nvfp4"))
    assert [one.nbytes for one in both] == [2 * one.nbytes for one in weights]


def test_cache_replaces_the_recipes(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "cached.yaml"
    path.write_text('kv_cache: fp8\nrules: [{quantize: ["*"], weights: int4}]\n')
    assert job(source, str(path)).quant.kv_cache == "fp8"
    assert job(source, str(path), export_kv_cache_quant="fp8_cast").quant.kv_cache == "fp8_cast"
    assert job(source, str(path), export_kv_cache_quant="none").quant.kv_cache == ""
    assert job(source, str(path), weight_only=True).quant.kv_cache == ""


@pytest.mark.parametrize(
    ("dialect", "names", "shape"),
    [
        ("modelopt", ("k_proj.k_scale", "v_proj.v_scale"), ()),
        ("compressed-tensors", ("k_scale", "v_scale"), (1,)),
    ],
)
def test_scales_of_the_cache_are_planned(
    dialect: str, names: tuple[str, str], shape: tuple[int, ...], source: Path
) -> None:
    plain = job(source, "nvfp4", export_format=dialect)
    cached = job(source, "nvfp4", export_format=dialect, export_kv_cache_quant="fp8")
    entries = {e.name: e.shape for e in cached.export.entries}
    added = entries.keys() - {e.name for e in plain.export.entries}
    assert added == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in names}
    assert {entries[name] for name in added} == {shape}
    assert cached.export.bytes_before == plain.export.bytes_before
    assert cached.export.bytes_after == plain.export.bytes_after + 4 * len(added)


@pytest.mark.parametrize(
    ("recipe", "flags", "kind", "message"),
    [
        (
            "int4",
            {"weight_only": True, "export_kv_cache_quant": "fp8"},
            RecipeError,
            "--export-kv-cache-quant fp8 needs calibration, but --weight-only runs no data: take",
        ),
        (
            "int4",
            {"export_format": "gptq", "export_kv_cache_quant": "fp8_cast"},
            FormatError,
            "a gptq checkpoint has no scales of a fp8_cast KV cache; export modelopt or",
        ),
        ("int4", {"export_kv_cache_quant": "nvfp4"}, RecipeError, "kv_cache must be one of fp8,"),
        ("int4", {"algorithm": "awq3"}, RecipeError, "algorithm must be one of max, mse, imatrix"),
        ("int4", {"alpha": 0.1}, RecipeError, "alpha belongs to algorithms awq and smoothquant"),
        ("int4", {"damp": 0.1}, RecipeError, "damp belongs to algorithm gptq, which no rule has"),
        (
            "int4",
            {"algorithm": "gptq", "damp": 7.0},
            RecipeError,
            "with --damp: damp must be above 0 and at most 1, got 7.0",
        ),
        (
            "int4",
            {"save_calibration": Path("x")},
            QuantError,
            "--save-calibration: recipe 'int4' needs no calibration data; leave it out",
        ),
        (
            "nvfp4",
            {"save_calibration": Path("x"), "keep_hessians": True},
            QuantError,
            "--keep-hessians: second moments are measured only for algorithm gptq",
        ),
        ("int8", {"weight_only": True}, RecipeError, "weight-only INT8 is int8_group"),
        (
            "int4",
            {"serve_engine": "vllm", "serve_tp": 2},
            FormatError,
            "a rank's 192 inputs end inside a group of 128; take group_size: 64 or --serve-tp 1",
        ),
        (
            "nvfp4",
            {"serve_engine": "transformers"},
            FormatError,
            "NVFP4 experts load without an error but their global scales are ignored; take the",
        ),
        ("fp8_channel", {"export_format": "modelopt"}, FormatError, "is for dense layers"),
        ("int4", {"serve_tp": 0}, FormatError, "--serve-tp is 0: give at least 1"),
    ],
)
def test_refused_at_planning(
    recipe: str, flags: dict[str, Any], kind: type[QuantError], message: str, source: Path
) -> None:
    with pytest.raises(kind) as error:
        job(source, recipe, **flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
