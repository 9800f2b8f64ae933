import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

from megatron_quant.ckpt.dialects.base import Layer, ModuleFormat
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import amax, decode, encode, get_format, tensor_scale
from megatron_quant.formats.spec import CHANNEL, Format
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot
from tests.unit import exported
from tests.unit.exported import CHOICES

COMPRESSED = get_dialect("compressed-tensors")
NAMES = tuple(s.module for p in exported.PARAMS for s in p.sources if len(s.shape) == 2)
FORMATS = {
    "fp8": "float-quantized",
    "fp8_channel": "float-quantized",
    "fp8_block": "float-quantized",
    "int8": "int-quantized",
    "int4": "pack-quantized",
    "int4_asym": "pack-quantized",
    "int8_group": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
Pair = tuple[Format, Format | None]


def a_weight() -> torch.Tensor:
    w_NK = exported.source_weights()["model.layers.0.mlp.experts.1.down_proj.weight"]
    w_NK[0, :16] = 0
    w_NK[1] *= 1e-3
    return w_NK


def one_layer(fmt: Format, inputs: Format | None) -> QuantPlan:
    slot = Slot(name="a.weight", sources=("a",), shape=(128, 128))
    return QuantPlan("test", (Decision(slot=slot, rule="test", weights=fmt, inputs=inputs),))


def encoded(fmt: Format, inputs: Format | None) -> tuple[exported.Tensors, exported.Tensors]:
    """Fields, and what is on disk."""
    w_NK = a_weight()
    dscale = tensor_scale(amax(w_NK), fmt) if fmt.tensor_scale else None
    stored = COMPRESSED.stored(fmt, inputs)
    return encode(w_NK, fmt, dscale), exported.stored_tensors(w_NK, fmt, inputs, stored)


def compressor(config: dict[str, Any]) -> tuple[Any, Any]:
    """compressed-tensors' own codec and scheme of what a config says."""
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    return BaseCompressor.get_value_from_registry(config["format"]), parsed.config_groups["group_0"]


def all_formats() -> list[Pair]:
    grouped = [
        (get_format(name, size), None)
        for name in ("int4", "int4_asym", "int8_group")
        for size in (32, 64, CHANNEL)
    ]
    more = [("fp8_channel", None), ("fp8_block", None), ("mxfp8", None), ("int4", "fp8_channel")]
    pairs = [(get_format(w), get_format(i) if i else None) for w, i in more]
    return [*map(exported.formats, CHOICES), *grouped, *pairs]


# Bytes


@pytest.mark.parametrize(("fmt", "inputs"), all_formats())
def test_their_decompressor_gives_our_values(fmt, inputs):
    config = COMPRESSED.quantization_config(one_layer(fmt, inputs))
    codec, scheme = compressor(config)
    fields, disk = encoded(fmt, inputs)
    theirs = codec.decompress(dict(disk), scheme)["weight"]
    assert torch.equal(theirs, decode(fields, fmt, theirs.dtype))


@pytest.mark.parametrize(("fmt", "inputs"), all_formats())
def test_their_compressor_gives_our_bytes(fmt, inputs):
    codec, scheme = compressor(COMPRESSED.quantization_config(one_layer(fmt, inputs)))
    fields, disk = encoded(fmt, inputs)
    given = {n: t for n, t in disk.items() if "scale" in n}
    if fmt.name == "nvfp4":
        given["weight_scale"] = given["weight_scale"].float()
    if fmt.name.startswith("mx"):
        given["weight_scale"] = torch.exp2(given["weight_scale"].float() - 127)
    if fmt.zero_point:
        given["weight_zero_point"] = fields["zero"].to(torch.int8) - 8
    # Values that the format holds exactly are not rounded, so their quotients do not matter.
    w_NK = decode(fields, fmt, torch.float32)
    theirs = codec.compress({"weight": w_NK, **given}, scheme)
    assert theirs.keys() == disk.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == disk[name].dtype and tensor.shape == disk[name].shape, name
        assert torch.equal(comparable(tensor), comparable(disk[name])), name


def comparable(stored: torch.Tensor) -> torch.Tensor:
    """Equal where the values are: negative zero is zero."""
    if stored.dtype == torch.uint8 and stored.shape[1] == 64:
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


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        ("fp8", "nvfp4", "no fp8 weights with nvfp4 inputs; take inputs of fp8 or fp8_channel"),
        ("int8", None, "take int8_group weights, or add inputs: int8"),
        ("int4_asym", "fp8", "symmetric weights: take int4"),
        ("fp8_block", "fp8", "take inputs of fp8_group"),
        ("fp8_group", None, "no fp8_group weights"),
    ],
)
def test_pairs_that_are_refused(weights, inputs, message):
    with pytest.raises(FormatError, match=message):
        COMPRESSED.stored(get_format(weights), get_format(inputs) if inputs else None)


def test_static_int8_experts_are_refused():
    with pytest.raises(FormatError, match=r"no engine runs experts with int8.*inputs: int8 "):
        COMPRESSED.stored(*exported.formats("int8_static"), Layer.EXPERT)


# JSON


@pytest.mark.parametrize("choice", CHOICES)
def test_config(choice):
    config = COMPRESSED.quantization_config(exported.plan(choice))
    QuantizationConfig.model_validate(json.loads(json.dumps(config)))
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
        ("FP8_DYNAMIC", "float-quantized", "fp8_channel"),
        ("FP8_BLOCK", "float-quantized", "fp8_block"),
        ("INT8", "int-quantized", "int8"),
        ("NVFP4", "nvfp4-pack-quantized", "nvfp4"),
        ("NVFP4A16", "nvfp4-pack-quantized", "nvfp4 weights"),
        ("MXFP8", "mxfp8-quantized", "mxfp8"),
        ("MXFP4", "mxfp4-pack-quantized", "mxfp4"),
        ("MXFP4A16", "mxfp4-pack-quantized", "mxfp4 weights"),
        ("W4A16", "pack-quantized", "int4"),
        ("W4A16_ASYM", "pack-quantized", "int4_asym"),
        ("W8A16", "pack-quantized", "int8_group"),
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


def test_their_w4afp8_is_read():
    theirs = QuantizationConfig(
        config_groups={"g": preset_name_to_scheme("W4AFP8", ["Linear"])}, format="pack-quantized"
    )
    found = COMPRESSED.read_config(json.loads(theirs.model_dump_json()), ("a",))
    assert found == {"a": ModuleFormat(get_format("int4"), get_format("fp8_channel"))}


@pytest.mark.parametrize("size", [32, 64, CHANNEL])
@pytest.mark.parametrize("name", ["int4", "int4_asym", "int8_group"])
def test_group_sizes_are_read_back(name, size):
    fmt = get_format(name, size)
    config = COMPRESSED.quantization_config(one_layer(fmt, None))
    arguments = config["config_groups"]["group_0"]["weights"]
    assert arguments["strategy"] == ("channel" if size == CHANNEL else "group")
    assert arguments["group_size"] == (None if size == CHANNEL else size)
    assert COMPRESSED.read_config(config, ("a",)) == {"a": ModuleFormat(fmt, None)}


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
        ("W4A8", "num_bits=8, type='int', .* is not read|with int8 inputs is not read"),
        ("W5A16", "num_bits=5.* is not read; known weights: fp8, fp8_channel"),
        ("MXFP6A16", "num_bits=6"),
        ("MXFP4XFP8", "with fp8_group inputs is not read"),
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
        ({"weights": None}, "num_bits=None, .* is not read"),
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


def test_kv_cache_is_declared():
    quant = replace(exported.plan("fp8"), kv_cache="fp8_cast")
    config = COMPRESSED.quantization_config(quant)
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    assert (parsed.kv_cache_scheme.num_bits, parsed.kv_cache_scheme.strategy) == (8, "tensor")
    assert COMPRESSED.read_kv_cache(config) == "fp8"
    assert COMPRESSED.read_kv_cache(COMPRESSED.quantization_config(exported.plan("fp8"))) == ""


def test_scales_of_the_kv_cache():
    keys, values = COMPRESSED.cache_scales
    assert (keys.suffix, values.suffix) == ("k_scale", "v_scale")
    assert keys.to_disk(torch.tensor(2.0)).shape == keys.shape(0, 0) == (1,)


def test_cache_that_is_not_read():
    with pytest.raises(CheckpointError, match=r"kv_cache_scheme .*attn_head.* is not read"):
        COMPRESSED.read_kv_cache(
            {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"}}
        )


# Mixed precision


def mixed() -> QuantPlan:
    """FP8 attention, INT4 experts."""
    plans = zip(exported.plan("fp8").decisions, exported.plan("int4").decisions, strict=True)
    return QuantPlan("mixed", tuple(b if "experts" in b.slot.name else a for a, b in plans))


def test_mixed_precision():
    config = COMPRESSED.quantization_config(mixed())
    assert config["format"] == "mixed-precision"
    formats = [g["format"] for g in config["config_groups"].values()]
    assert formats == ["pack-quantized", "float-quantized"]
    QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    found = COMPRESSED.read_config(config, NAMES)
    assert found == {
        n: ModuleFormat(d.weights, d.inputs) for d in mixed().quantized for n in d.slot.sources
    }


def test_mixed_groups_name_what_engines_fuse():
    config = COMPRESSED.quantization_config(mixed())
    names = (
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.experts.0.w1",
        "model.layers.10.self_attn.q_proj",
    )
    found = COMPRESSED.read_config(config, names)
    assert [found[n].weights.name for n in names[:2]] == ["fp8", "int4"] and len(found) == 2


def test_formats_of_one_layout_are_groups_too():
    plans = zip(exported.plan("fp8").decisions, exported.plan("fp8_block").decisions, strict=True)
    quant = QuantPlan("m", tuple(b if "experts" in b.slot.name else a for a, b in plans))
    config = COMPRESSED.quantization_config(quant)
    assert config["format"] == "float-quantized" and len(config["config_groups"]) == 2


# Plans that are refused


def test_some_of_a_layers_experts():
    quant = exported.plan("nvfp4", keep=lambda m: "experts.0" in m)
    with pytest.raises(FormatError, match="all of a layer's experts or none"):
        COMPRESSED.quantization_config(quant)
