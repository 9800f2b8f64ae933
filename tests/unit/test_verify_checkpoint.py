from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.dialects.base import Stored
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.verify.checkpoint import BOUNDS, verify
from megatron_quant.errors import CheckpointError, VerifyError
from tests.unit import exported
from tests.unit.exported import CONFIG, INDEX, WRITTEN

ATTENTION = "model.layers.0.self_attn"
EXPERT = "model.layers.0.mlp.experts.1"
OUT = f"{ATTENTION}.o_proj"
EXPERTS_DOWN = [f"mlp.experts.{e}.down_proj" for e in (0, 1)]
ROUTER = "model.layers.0.mlp.gate"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def nvfp4(tmp_path, weights):
    return exported.export(tmp_path / "out", "modelopt", exported.plan("nvfp4"), weights)


@pytest.mark.parametrize(("dialect", "choice"), WRITTEN)
def test_good_export(tmp_path, weights, source, dialect, choice):
    quant = exported.written_plan(dialect, choice)
    directory = exported.export(tmp_path / "out", dialect, quant, weights)
    report = verify(directory, source)
    assert report.problems == ()
    report.raise_for_problems()
    assert [t.name for t in report.tensors] == list(weights)
    worst = report.worst(3)
    assert len(worst) == 3 and worst[0].error >= worst[1].error > 0
    assert worst[0].error < BOUNDS[exported.formats(choice)[0].bits] / 3
    assert {t.name.removesuffix(".weight") for t in report.tensors if t.format} == {
        n for d in quant.quantized for n in d.slot.sources
    }


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_excluded_attention(tmp_path, weights, source, dialect):
    quant = exported.plan("nvfp4", keep=lambda module: "self_attn" in module)
    directory = exported.export(tmp_path / "out", dialect, quant, weights)
    assert verify(directory, source).problems == ()
    assert all("experts" in module for module in QuantizedCheckpoint(directory).modules)


def test_plain_checkpoint(source, weights):
    report = verify(source, source)
    assert report.problems == () and report.worst(5) == ()


def test_without_source_errors_are_unknown(nvfp4):
    report = verify(nvfp4)
    assert report.problems == () and all(t.error is None for t in report.tensors)


def broken(directory: Path, *parts: str, against: Path | None = None) -> None:
    """Exactly one problem, with ``parts`` in its line."""
    report = verify(directory, against)
    assert len(report.problems) == 1, report.problems
    assert all(part in report.problems[0] for part in parts), report.problems
    with pytest.raises(VerifyError, match=str(directory)) as raised:
        report.raise_for_problems()
    assert "\n" not in str(raised.value)


# Files and index


def test_missing_index(nvfp4):
    (nvfp4 / INDEX).unlink()
    broken(nvfp4, INDEX, "interrupted")


def test_index_without_map(nvfp4):
    (nvfp4 / INDEX).write_text("{}")
    broken(nvfp4, "weight_map")


def test_index_is_no_json(nvfp4):
    (nvfp4 / INDEX).write_text("{")
    broken(nvfp4, INDEX, "JSON")


def test_missing_file(nvfp4):
    (nvfp4 / SECOND).unlink()
    broken(nvfp4, SECOND, "missing")


def test_truncated_file(nvfp4):
    data = (nvfp4 / FIRST).read_bytes()
    (nvfp4 / FIRST).write_bytes(data[:-1])
    broken(nvfp4, FIRST, "no whole safetensors file")


def test_file_that_the_index_does_not_name(nvfp4):
    save_file({"x": torch.zeros(1)}, nvfp4 / "more.safetensors")
    broken(nvfp4, "more.safetensors", "does not name")


def test_tensor_that_the_index_does_not_name(nvfp4):
    tensors = load_file(nvfp4 / FIRST)
    save_file(tensors | {"more.weight": torch.zeros(1)}, nvfp4 / FIRST)
    broken(nvfp4, "more.weight", FIRST, "none")


def test_tensor_in_two_files(nvfp4):
    name, tensor = next(iter(load_file(nvfp4 / FIRST).items()))
    save_file(load_file(nvfp4 / SECOND) | {name: tensor}, nvfp4 / SECOND)
    broken(nvfp4, name, SECOND, FIRST)


def test_tensor_not_in_its_file(nvfp4):
    tensors = load_file(nvfp4 / FIRST)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, nvfp4 / FIRST)
    broken(nvfp4, name, FIRST, "missing")


def test_wrong_total_size(nvfp4):
    exported.edit_json(nvfp4 / INDEX, lambda index: index["metadata"].update(total_size=7))
    broken(nvfp4, "total_size is 7")


def test_one_file_needs_no_index(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    exported.write_json(tmp_path / "config.json", CONFIG)
    assert verify(tmp_path).problems == ()


# Config


def test_config_is_no_json(nvfp4):
    (nvfp4 / "config.json").write_text("{")
    broken(nvfp4, "config.json")


def test_unknown_architecture(nvfp4):
    def other(config):
        config.update(architectures=["Other"], num_hidden_layers=9)

    exported.edit_json(nvfp4 / "config.json", other)
    broken(nvfp4, "has no tensor, though config.json has 9 layers")


def test_unknown_quant_method(nvfp4):
    exported.edit_json(
        nvfp4 / "config.json", lambda c: c["quantization_config"].update(quant_method="hqq")
    )
    broken(nvfp4, "hqq", "modelopt, compressed-tensors")


def test_unknown_algorithm(nvfp4):
    exported.edit_json(
        nvfp4 / "config.json", lambda c: c["quantization_config"].update(quant_algo="MXFP9")
    )
    broken(nvfp4, "MXFP9", "W4A16_NVFP4")


@pytest.mark.parametrize(
    ("key", "value"), [("quant_algo", "FP8"), ("exclude_modules", []), ("group_size", 32)]
)
def test_hf_quant_config_contradicts(nvfp4, key, value):
    exported.edit_json(
        nvfp4 / "hf_quant_config.json", lambda c: c["quantization"].update({key: value})
    )
    broken(nvfp4, "hf_quant_config.json", key)


def test_hf_quant_config_without_section(nvfp4):
    exported.write_json(nvfp4 / "hf_quant_config.json", {})
    broken(nvfp4, "no quantization section")


# Tensors


def test_missing_scale(nvfp4):
    name = f"{EXPERT}.down_proj.weight_scale"
    exported.edit(nvfp4, lambda t: t.pop(name))
    broken(nvfp4, name, "missing")


def test_missing_weight(nvfp4):
    exported.edit(nvfp4, lambda t: t.pop(f"{ROUTER}.weight"))
    broken(nvfp4, ROUTER, "missing")


def test_wrong_shape(nvfp4):
    name = f"{EXPERT}.down_proj.weight_scale"
    exported.edit(nvfp4, lambda t: t.update({name: t[name][:, :-1]}))
    broken(nvfp4, name, "(128, 7)", "(128, 8)")


def test_wrong_dtype(nvfp4):
    name = f"{EXPERT}.down_proj.weight_scale"
    exported.edit(nvfp4, lambda t: t.update({name: t[name].float()}))
    broken(nvfp4, name, "float32", "float8_e4m3fn")


def test_orphan_scale(nvfp4):
    name = f"{ROUTER}.weight_scale"
    exported.edit(nvfp4, lambda t: t.update({name: torch.ones(())}))
    broken(nvfp4, name, "knows no such tensor")


def test_linear_that_is_neither_quantized_nor_ignored(tmp_path, weights):
    quant = exported.plan("nvfp4", keep=lambda module: module.endswith("o_proj"))
    directory = exported.export(tmp_path / "out", "compressed-tensors", quant, weights)
    name = f"{ATTENTION}.o_proj"
    exported.edit_json(
        directory / "config.json", lambda c: c["quantization_config"]["ignore"].remove(name)
    )
    broken(directory, name, "neither quantized nor in the ignore list")


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_quantized_although_ignored(tmp_path, weights, dialect):
    directory = exported.export(tmp_path / "out", dialect, exported.plan("nvfp4"), weights)
    name = f"{ATTENTION}.o_proj"
    exported.edit_json(
        directory / "config.json", lambda c: c["quantization_config"]["ignore"].append(name)
    )
    problems = verify(directory).problems
    stored = get_dialect(dialect).stored(*exported.formats("nvfp4"))
    strays = {f"{name}.{s.suffix}" for s in stored} - {f"{name}.weight"}
    assert all(any(p.startswith(f"{stray}:") for p in problems) for stray in strays)
    assert any(p.startswith(f"{name}.weight:") for p in problems)


# Values


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_bad_block_scale(nvfp4, value):
    name = f"{EXPERT}.up_proj.weight_scale"

    def change(tensors):
        scale = tensors[name].float()
        scale[3, 2] = value
        tensors[name] = scale.to(torch.float8_e4m3fn)

    exported.edit(nvfp4, change)
    broken(nvfp4, name, "not positive" if value == 0 else "NaN")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["weight_scale_2", "input_scale"])
def test_bad_tensor_scale(nvfp4, suffix, value):
    name = f"{EXPERT}.down_proj.{suffix}"
    exported.edit(nvfp4, lambda t: t[name].fill_(value))
    broken(nvfp4, name, "not positive" if value <= 0 else "NaN or infinity")


def test_nan_element(tmp_path, weights):
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("fp8"), weights)
    name = f"{EXPERT}.down_proj.weight"
    exported.edit(directory, lambda t: t[name].view(torch.uint8)[0, 0].fill_(0x7F))
    broken(directory, name, "NaN")


def test_wrong_stored_shape(tmp_path, weights):
    plan = exported.plan("int4")
    directory = exported.export(tmp_path / "out", "compressed-tensors", plan, weights)
    name = f"{EXPERT}.down_proj.weight_shape"
    exported.edit(directory, lambda t: t[name].fill_(3))
    broken(directory, name, "does not fit the shape [128, 128]")


@pytest.mark.parametrize(
    ("module", "suffix"),
    [
        (f"{ATTENTION}.k_proj", "weight_scale_2"),
        (f"{ATTENTION}.v_proj", "input_scale"),
        (f"{EXPERT}.up_proj", "weight_scale_2"),
        (f"{EXPERT}.up_proj", "input_scale"),
    ],
)
def test_unequal_fused_scales(nvfp4, module, suffix):
    exported.edit(nvfp4, lambda t: t[f"{module}.{suffix}"].mul_(1.01))
    broken(nvfp4, module, suffix, "not equal")


def test_partly_quantized_group(tmp_path, weights):
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("nvfp4"), weights)
    name = f"{ATTENTION}.v_proj"
    suffixes = ("weight_scale", "weight_scale_2", "input_scale")

    def change(tensors):
        for suffix in suffixes:
            del tensors[f"{name}.{suffix}"]
        tensors[f"{name}.weight"] = weights[f"{name}.weight"]

    exported.edit(directory, change)
    for file, keys in (
        ("config.json", ("quantization_config", "ignore")),
        ("hf_quant_config.json", ("quantization", "exclude_modules")),
    ):
        exported.edit_json(directory / file, lambda c, k=keys: c[k[0]][k[1]].append(name))
    broken(directory, f"{ATTENTION}.q_proj", name, "fuse")


def test_unequal_weight_scales_of_fp8_are_legal(tmp_path, weights):
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("fp8"), weights)
    exported.edit(directory, lambda t: t[f"{ATTENTION}.k_proj.weight_scale"].mul_(1.01))
    assert verify(directory).problems == ()


@pytest.mark.parametrize("suffix", ["qzeros", "g_idx"])
def test_constants_of_gptq(tmp_path, weights, suffix):
    directory = exported.export(tmp_path / "out", "gptq", exported.plan("int4"), weights)
    exported.edit(directory, lambda t: t[f"{OUT}.{suffix}"][0].add_(1))
    broken(directory, f"{OUT}.{suffix}", "does not fit the shape [128, 128]")
    with pytest.raises(CheckpointError, match=f"{suffix} (does not fit the config|holds 1, but)"):
        QuantizedCheckpoint(directory).weight(f"{OUT}.weight", torch.float32)


def test_gptq_without_group_index(tmp_path, weights, source):
    directory = exported.export(tmp_path / "out", "gptq", exported.plan("int4"), weights)
    exported.edit(directory, lambda t: [t.pop(n) for n in list(t) if n.endswith("g_idx")])
    assert verify(directory, source).problems == ()


@pytest.mark.parametrize("dialect", ["gptq", "awq", "auto-round"])
def test_plain_weights_are_unquantized_whatever_the_config_says(tmp_path, weights, source, dialect):
    quant = exported.plan("int4_asym" if dialect == "awq" else "int4", keep=lambda m: m == OUT)
    directory = exported.export(tmp_path / "out", dialect, quant, weights)
    for key in ("dynamic", "extra_config", "modules_to_not_convert"):
        exported.edit_json(
            directory / "config.json", lambda c, k=key: c["quantization_config"].pop(k, None)
        )
    report = verify(directory, source)
    assert report.problems == ()
    assert {t.name: t.format for t in report.tensors}[f"{OUT}.weight"] == ""


# The KV cache


def with_cache(directory: Path, dialect: str, weights: exported.Tensors) -> Path:
    quant = replace(exported.plan("fp8"), kv_cache="fp8")
    exported.export(directory, dialect, quant, weights)
    scales = {
        f"{ATTENTION}.{s.suffix}": s.to_disk(torch.tensor(0.5)) for s in cache_scales(dialect)
    }
    exported.edit(directory, lambda t: t.update(scales))
    return directory


def cache_scales(dialect: str) -> tuple[Stored, ...]:
    return get_dialect(dialect).cache_scales


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_kv_cache(tmp_path, weights, source, dialect):
    directory = with_cache(tmp_path / "out", dialect, weights)
    assert verify(directory, source).problems == ()
    checkpoint = QuantizedCheckpoint(directory)
    assert checkpoint.kv_cache == "fp8" and sorted(checkpoint) == sorted(weights)


@pytest.mark.parametrize("dialect", ["modelopt", "compressed-tensors"])
def test_bad_scales_of_the_kv_cache(tmp_path, weights, dialect):
    directory = with_cache(tmp_path / "out", dialect, weights)
    keys, values = (f"{ATTENTION}.{s.suffix}" for s in cache_scales(dialect))
    exported.edit(directory, lambda t: t[keys].fill_(float("nan")))
    broken(directory, keys, "NaN or infinity")
    exported.edit(directory, lambda t: (t.pop(keys), t[values].fill_(0)))
    problems = verify(directory).problems
    assert len(problems) == 2 and "missing" in problems[0] and "not positive" in problems[1]
    exported.edit(directory, lambda t: t.update({keys: torch.ones(2), values: torch.ones(2)}))
    assert all("torch.float32 [2], not" in p for p in verify(directory).problems)


def test_scales_of_a_cache_that_is_not_declared(tmp_path, weights):
    directory = with_cache(tmp_path / "out", "compressed-tensors", weights)
    exported.edit_json(
        directory / "config.json", lambda c: c["quantization_config"].update(kv_cache_scheme=None)
    )
    problems = verify(directory).problems
    assert len(problems) == 2 and all("knows no such tensor" in p for p in problems)


# Against the source


@pytest.mark.parametrize(("dialect", "choice"), WRITTEN)
def test_swapped_weights(tmp_path, weights, source, dialect, choice):
    """Every tensor of two modules in the other's place: nothing but the values is wrong."""
    quant = exported.written_plan(dialect, choice)
    directory = exported.export(tmp_path / "out", dialect, quant, weights)
    dense = (dialect, choice) in exported.DENSE_ONLY
    pair = ("self_attn.k_proj", "self_attn.v_proj") if dense else EXPERTS_DOWN
    modules = [f"model.layers.0.{name}" for name in pair]
    suffixes = {n.removeprefix(f"{modules[0]}.") for n in exported.read(directory)} - weights.keys()

    def swap(tensors):
        for suffix in suffixes:
            a, b = (f"{m}.{suffix}" for m in modules)
            if a in tensors:
                tensors[a], tensors[b] = tensors[b], tensors[a]

    exported.edit(directory, swap)
    assert verify(directory).problems == ()
    problems = verify(directory, source).problems
    assert [p.partition(":")[0] for p in problems] == [f"{m}.weight" for m in modules]
    assert all("relative error" in p for p in problems)


def doubled(scale: torch.Tensor) -> None:
    scale.mul_(2)


def exponents_up(scale: torch.Tensor) -> None:
    scale.add_(1)


@pytest.mark.parametrize(("dialect", "choice"), WRITTEN)
def test_doubled_scale(tmp_path, weights, source, dialect, choice):
    quant = exported.written_plan(dialect, choice)
    directory = exported.export(tmp_path / "out", dialect, quant, weights)
    scale = next(
        s.suffix
        for s in reversed(get_dialect(dialect).stored(*exported.formats(choice)))
        if s.field in ("scale", "tensor_scale")
    )
    microscaled = choice.startswith("mx")  # a step of the exponent
    exported.edit(
        directory,
        lambda t: t[f"{OUT}.{scale}"].add_(1) if microscaled else t[f"{OUT}.{scale}"].mul_(2),
    )
    broken(directory, f"{OUT}.weight", "relative error", against=source)


def test_changed_plain_weight(nvfp4, source):
    exported.edit(nvfp4, lambda t: t[f"{ROUTER}.weight"][0, 0].add_(1))
    broken(nvfp4, ROUTER, "differs", against=source)


def test_source_of_another_dtype(tmp_path, weights):
    wide = {name: w.float() * 1.001 for name, w in weights.items()}
    rounded = {name: w.bfloat16() for name, w in wide.items()}
    source = exported.write(tmp_path / "wide", wide)
    directory = exported.export(tmp_path / "out", "modelopt", exported.plan("nvfp4"), rounded)
    assert verify(directory, source).problems == ()


def test_tensor_that_the_source_lacks(nvfp4, tmp_path, weights):
    fewer = {n: w for n, w in weights.items() if n != f"{ROUTER}.weight"}
    broken(nvfp4, ROUTER, "no such tensor", against=exported.write(tmp_path / "few", fewer))


def test_source_that_is_none(nvfp4, tmp_path):
    with pytest.raises(CheckpointError):
        verify(nvfp4, tmp_path / "nowhere")


def test_all_problems_are_collected(nvfp4):
    names = [f"{EXPERT}.down_proj.weight_scale", f"{ROUTER}.weight"]
    exported.edit(nvfp4, lambda t: [t.pop(name) for name in names])
    report = verify(nvfp4)
    assert len(report.problems) == 2 and all(
        any(name in p for p in report.problems) for name in names
    )
    with pytest.raises(VerifyError, match=r"\(and 1 more\)"):
        report.raise_for_problems()
