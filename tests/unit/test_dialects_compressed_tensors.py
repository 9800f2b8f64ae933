import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

from megatron_quant.ckpt.dialects import get_dialect
from megatron_quant.ckpt.dialects.base import ModuleFormat
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import amax, decode, encode, get_format, tensor_scale
from megatron_quant.formats.spec import Format
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot
from tests.unit import exported
from tests.unit.exported import CHOICES

COMPRESSED = get_dialect("compressed-tensors")
NAMES = tuple(s.module for p in exported.PARAMS for s in p.sources if len(s.shape) == 2)
FORMATS = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "int4": "pack-quantized",
}


def a_weight() -> torch.Tensor:
    w_NK = exported.source_weights()["model.layers.0.mlp.experts.1.down_proj.weight"]
    w_NK[0, :16] = 0
    w_NK[1] *= 1e-3
    return w_NK


def one_layer(fmt: Format, inputs: Format | None) -> QuantPlan:
    slot = Slot("a.weight", ("a",), (128, 128))
    return QuantPlan("test", (Decision(slot, "test", fmt, inputs),))


def encoded(fmt: Format, inputs: Format | None) -> tuple[exported.Tensors, exported.Tensors]:
    """Fields, and what is on disk."""
    w_NK = a_weight()
    dscale = tensor_scale(amax(w_NK), fmt) if fmt.tensor_scale else None
    input_dscale = tensor_scale(exported.INPUT_AMAX, inputs) if inputs else None
    stored = COMPRESSED.stored(fmt, inputs)
    disk = exported.stored_tensors(w_NK, fmt, dscale, input_dscale, stored)
    return encode(w_NK, fmt, dscale), disk


def compressor(config: dict[str, Any]) -> tuple[Any, Any]:
    """compressed-tensors' own codec and scheme of what a config says."""
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    return BaseCompressor.get_value_from_registry(config["format"]), parsed.config_groups["group_0"]


def all_formats() -> list[tuple[Format, Format | None]]:
    return [*map(exported.formats, CHOICES), (get_format("int4", 32), None)]


# Bytes


@pytest.mark.parametrize(("fmt", "inputs"), all_formats())
def test_their_decompressor_gives_our_values(fmt, inputs):
    config = COMPRESSED.quantization_config(one_layer(fmt, inputs))
    codec, scheme = compressor(config)
    fields, disk = encoded(fmt, inputs)
    theirs = codec.decompress(dict(disk), scheme)["weight"]
    assert torch.equal(theirs, decode(fields, fmt, theirs.dtype))


@pytest.mark.parametrize("choice", CHOICES)
def test_their_compressor_gives_our_bytes(choice):
    fmt, inputs = exported.formats(choice)
    codec, scheme = compressor(COMPRESSED.quantization_config(one_layer(fmt, inputs)))
    fields, disk = encoded(fmt, inputs)
    given = {n: t for n, t in disk.items() if "scale" in n}
    if fmt.name == "nvfp4":
        given["weight_scale"] = given["weight_scale"].float()
    # Their quotients of a bf16 weight are rounded as ours in int4 alone; values that the format
    # holds exactly are not rounded at all.
    w_NK = a_weight() if fmt.name == "int4" else decode(fields, fmt, torch.float32)
    theirs = codec.compress({"weight": w_NK, **given}, scheme)
    assert theirs.keys() == disk.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == disk[name].dtype and tensor.shape == disk[name].shape, name
        assert torch.equal(comparable(tensor), comparable(disk[name])), name


def comparable(stored: torch.Tensor) -> torch.Tensor:
    """Equal where the values are: negative zero is zero."""
    if stored.dtype == torch.uint8:
        codes = torch.stack((stored & 15, stored >> 4))
        return torch.where(codes == 8, 0, codes)
    return stored.float() if stored.is_floating_point() else stored


@pytest.mark.parametrize(("fmt", "inputs"), all_formats())
def test_names_and_shapes(fmt, inputs):
    codec, scheme = compressor(COMPRESSED.quantization_config(one_layer(fmt, inputs)))
    _, disk = encoded(fmt, inputs)
    weights = {n for n in disk if n.startswith("weight")}
    assert weights == {n for n in codec.compression_param_names(scheme) if n.startswith("weight")}
    for s in COMPRESSED.stored(fmt, inputs):
        assert disk[s.suffix].shape == s.shape(128, 128) and disk[s.suffix].dtype == s.dtype


def test_global_scales_are_divisors():
    fmt, inputs = exported.formats("nvfp4")
    _, disk = encoded(fmt, inputs)
    largest = amax(a_weight())
    torch.testing.assert_close(disk["weight_global_scale"], (6 * 448 / largest).reshape(1))
    torch.testing.assert_close(
        disk["input_global_scale"], (6 * 448 / exported.INPUT_AMAX).reshape(1)
    )


@pytest.mark.parametrize(("weights", "inputs"), [("int4", "fp8"), ("fp8", "nvfp4")])
def test_pairs_that_are_refused(weights, inputs):
    with pytest.raises(FormatError, match=f"no {weights}.* with {inputs} inputs; it writes"):
        COMPRESSED.stored(get_format(weights), get_format(inputs))


# JSON


@pytest.mark.parametrize("choice", CHOICES)
def test_config(choice):
    config = COMPRESSED.quantization_config(exported.plan(choice))
    assert config["format"] == FORMATS[CHOICES[choice][0]]
    assert config["ignore"] == ["model.embed_tokens", "model.layers.0.mlp.gate", "lm_head"]
    group = config["config_groups"]["group_0"]
    assert (group["input_activations"] is None) == (CHOICES[choice][1] is None)
    if choice == "nvfp4":
        assert group["input_activations"]["dynamic"] == "local"
    assert COMPRESSED.extra_files(exported.plan(choice)) == {}


@pytest.mark.parametrize("choice", CHOICES)
def test_config_is_read_back(choice):
    quant = exported.plan(choice, keep=lambda m: m.endswith("o_proj"))
    found = COMPRESSED.read_config(COMPRESSED.quantization_config(quant), NAMES)
    wanted = {n for d in quant.quantized for n in d.slot.sources}
    assert found == dict.fromkeys(wanted, ModuleFormat(*exported.formats(choice)))


@pytest.mark.parametrize(
    ("preset", "layout", "choice"),
    [
        ("FP8", "float-quantized", "fp8"),
        ("NVFP4", "nvfp4-pack-quantized", "nvfp4"),
        ("NVFP4A16", "nvfp4-pack-quantized", "nvfp4 weights"),
        ("W4A16", "pack-quantized", "int4"),
    ],
)
def test_their_presets_are_read(preset, layout, choice):
    theirs = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        format=layout,
        ignore=["lm_head", "re:.*mlp[.]gate$"],
    )
    config = json.loads(theirs.model_dump_json())
    found = COMPRESSED.read_config(config, NAMES)
    assert set(found) == set(NAMES) - {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"}
    assert set(found.values()) == {ModuleFormat(*exported.formats(choice))}


def test_groups_by_name():
    fp8 = COMPRESSED.quantization_config(exported.plan("fp8"))
    int4 = COMPRESSED.quantization_config(exported.plan("int4"))["config_groups"]["group_0"]
    fp8["config_groups"]["group_1"] = int4 | {"targets": ["re:.*down_proj$", "b.up_proj"]}
    fp8["format"] = "mixed-precision"
    found = COMPRESSED.read_config(fp8, ("a.down_proj", "a.up_proj", "b.up_proj"))
    assert [f.weights.name for f in found.values()] == ["int4", "fp8", "int4"]


def test_no_target():
    config = COMPRESSED.quantization_config(exported.plan("fp8"))
    config["config_groups"]["group_0"]["targets"] = ["re:.*down_proj$"]
    assert list(COMPRESSED.read_config(config, ("a.up_proj", "a.down_proj"))) == ["a.down_proj"]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("FP8_DYNAMIC", "'strategy': 'channel'.* are not read; known: fp8"),
        ("W4A16_ASYM", "'symmetric': False"),
        ("MXFP4", "'strategy': 'group'"),
        ("W4AFP8", "'strategy': 'token'"),
    ],
)
def test_presets_that_are_not_read(preset, message):
    theirs = QuantizationConfig(config_groups={"g": preset_name_to_scheme(preset, ["Linear"])})
    with pytest.raises(CheckpointError, match=message):
        COMPRESSED.read_config(json.loads(theirs.model_dump_json()), NAMES)


def change_group(config: dict[str, Any], **change: Any) -> dict[str, Any]:
    group = config["config_groups"]["group_0"] | change
    return config | {"config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int-quantized"}, "'int-quantized' with fp8.* is not read; known: float-q"),
        ({"weights": None}, "are not read"),
        (
            {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 48}},
            "group_size 48",
        ),
    ],
)
def test_groups_that_are_not_read(change, message):
    config = COMPRESSED.quantization_config(exported.plan("fp8"))
    with pytest.raises(CheckpointError, match=message):
        COMPRESSED.read_config(change_group(config, **change), NAMES)


def test_cache_scheme_is_not_read():
    config = COMPRESSED.quantization_config(exported.plan("fp8")) | {"kv_cache_scheme": {"a": 1}}
    with pytest.raises(CheckpointError, match="kv_cache_scheme"):
        COMPRESSED.read_config(config, NAMES)


# Plans that are refused


def test_some_of_a_layers_experts():
    quant = exported.plan("nvfp4", keep=lambda m: "experts.0" in m)
    with pytest.raises(FormatError, match="all of a layer's experts or none"):
        COMPRESSED.quantization_config(quant)


def test_mixed_precision():
    decisions = (*exported.plan("fp8").decisions, *exported.plan("int4").decisions)
    with pytest.raises(FormatError, match=r"mixed precision.*fp8.*int4"):
        COMPRESSED.quantization_config(QuantPlan("odd", decisions))
