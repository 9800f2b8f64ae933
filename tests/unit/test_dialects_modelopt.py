import warnings
from dataclasses import replace

import pytest
import torch

from megatron_quant.ckpt.dialects.base import Layer, ModuleFormat
from megatron_quant.ckpt.dialects.modelopt import HF_QUANT_CONFIG
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import amax, decode, encode, get_format
from megatron_quant.formats.spec import CHANNEL
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot
from tests.host import ready
from tests.unit import exported

ready()

from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format  # noqa: E402
from modelopt.torch.export.quant_utils import (  # noqa: E402
    pack_int4_in_uint8,
    to_quantized_weight,
)
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor  # noqa: E402

MODELOPT = get_dialect("modelopt")
CHOICES = exported.CELLS["modelopt"]
ALGORITHMS = {
    "fp8": "FP8",
    "fp8_channel": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8_block": "FP8_PB_WO",
    "nvfp4": "NVFP4",
    "nvfp4 weights": "W4A16_NVFP4",
    "mxfp8": "MXFP8",
    "int4": "W4A16_AWQ",
    "w4a8": "W4A8_AWQ",
}
NAMES = tuple(s.module for p in exported.PARAMS for s in p.sources if len(s.shape) == 2)


def a_weight() -> torch.Tensor:
    w_NK = exported.source_weights()["model.layers.0.mlp.experts.1.down_proj.weight"]
    w_NK[0, :16] = 0
    w_NK[1] *= 1e-3
    return w_NK


def on_disk(w_NK: torch.Tensor, choice: str) -> exported.Tensors:
    fmt, inputs = exported.formats(choice)
    return exported.stored_tensors(w_NK, fmt, inputs, MODELOPT.stored(fmt, inputs))


def mixed(*choices: str) -> QuantPlan:
    """Attention in the first format, experts in the second; attention's output in the third."""
    first, second, *third = choices
    plans = [exported.plan(c).decisions for c in (first, second, *(third or [first]))]
    pick = {"experts": 1, "linear_proj": 2}
    decisions = (
        of[next((i for part, i in pick.items() if part in of[0].slot.name), 0)]
        for of in zip(*plans, strict=True)
    )
    return QuantPlan("mixed", tuple(decisions))


# Bytes


def test_fp8_is_modelopts():
    w_NK = a_weight()
    stored = on_disk(w_NK, "fp8")
    scale = amax(w_NK) / 448
    assert torch.equal(stored["weight_scale"], scale) and stored["weight_scale"].shape == ()
    assert torch.equal(stored["input_scale"], exported.INPUT_AMAX / 448)
    theirs = to_quantized_weight(w_NK, scale, "fp8")
    assert torch.equal(stored["weight"].view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize(
    ("choice", "theirs", "shape"),
    [("fp8_channel", "fp8_pc_pt", (128,)), ("fp8_block", "fp8_pb_wo", (1, 1, 1, 1))],
)
def test_fp8_with_more_scales_is_modelopts(choice, theirs, shape):
    w_NK = a_weight()
    stored = on_disk(w_NK, choice)
    assert stored["weight_scale"].shape == shape and stored.keys() == {"weight", "weight_scale"}
    packed = to_quantized_weight(w_NK, stored["weight_scale"], theirs, block_size=128)
    assert torch.equal(stored["weight"].view(torch.uint8), packed.view(torch.uint8))


def test_mxfp8_is_modelopts():
    w_NK = a_weight()
    stored = on_disk(w_NK, "mxfp8")
    scale = MXFP8QTensor.get_weights_scaling_factor(w_NK)
    theirs = to_quantized_weight(w_NK, scale, "mxfp8")
    assert torch.equal(stored["weight_scale"], scale)
    assert torch.equal(stored["weight"].view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("choice", ["nvfp4", "nvfp4 weights"])
def test_nvfp4_is_modelopts(choice):
    w_NK = a_weight()
    stored = on_disk(w_NK, choice)
    scale_2 = NVFP4QTensor.get_weights_scaling_factor_2(w_NK)
    scale, _ = NVFP4QTensor.get_weights_scaling_factor(w_NK, 16, scale_2)
    assert torch.equal(stored["weight_scale_2"], scale_2)
    assert torch.equal(stored["weight_scale"].view(torch.uint8), scale.view(torch.uint8))
    theirs = to_quantized_weight(w_NK, scale, "nvfp4", scale_2, 16)
    assert torch.equal(stored["weight"], theirs)
    if choice == "nvfp4":
        assert torch.equal(stored["input_scale"], exported.INPUT_AMAX / (6 * 448))


@pytest.mark.parametrize("group", [32, 128])
def test_int4_is_packed_as_modelopt_packs(group):
    """The codec's own rounding is not ModelOpt's, so its values are what ModelOpt packs here."""
    w_NK, fmt = a_weight(), get_format("int4", group)
    stored = exported.stored_tensors(w_NK, fmt, None, MODELOPT.stored(fmt, None))
    decoded = decode(encode(w_NK, fmt, None), fmt, torch.float32)
    theirs = pack_int4_in_uint8(decoded, stored["weight_scale"], group)
    assert stored["weight"].shape == (64, 128) and stored["weight_scale"].dtype == torch.float32
    assert torch.equal(stored["weight"], theirs)


def test_w4a8_has_the_scale_of_the_whole_weight_too():
    w_NK = a_weight()
    stored = on_disk(w_NK, "w4a8")
    assert stored.keys() == {"weight", "weight_scale", "weight_scale_2", "input_scale"}
    assert torch.equal(stored["weight_scale_2"], amax(w_NK) / 448)
    assert torch.equal(stored["input_scale"], exported.INPUT_AMAX / 448)
    weights_alone = on_disk(w_NK, "int4")
    assert all(torch.equal(stored[n], t) for n, t in weights_alone.items())


@pytest.mark.parametrize("choice", CHOICES)
def test_shapes_are_those_written(choice):
    w_NK = torch.cat([a_weight(), a_weight()[:64]])
    stored = on_disk(w_NK, choice)
    for s in MODELOPT.stored(*exported.formats(choice)):
        assert stored[s.suffix].shape == s.shape(192, 128), s.suffix
        assert stored[s.suffix].dtype == s.dtype


def test_block_scales_of_experts_have_two_dims_and_another_name():
    pair = exported.formats("fp8_block")
    dense, expert = (MODELOPT.stored(*pair, layer)[1] for layer in Layer)
    assert (dense.suffix, dense.shape(200, 384)) == ("weight_scale", (2, 1, 3, 1))
    assert (expert.suffix, expert.shape(200, 384)) == ("weight_scale_inv", (2, 3))


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        ("fp8", None, "calibrate the inputs too.*compressed-tensors"),
        ("int4", "fp8_channel", "no int4 .* with fp8_channel inputs; .*take inputs: fp8"),
        ("fp8", "nvfp4", "no fp8 weights with nvfp4 inputs; it writes FP8, FP8_PER"),
        ("int8", "int8", "no int8 weights .*: export compressed-tensors"),
        ("int4_asym", None, "no int4_asym.*take int4"),
        ("mxfp4", None, "no mxfp4 .*take nvfp4"),
    ],
)
def test_formats_without_algorithm(weights, inputs, message):
    with pytest.raises(FormatError, match=message):
        MODELOPT.stored(get_format(weights), get_format(inputs) if inputs else None)


def test_channels_of_int4_are_refused():
    with pytest.raises(FormatError, match=r"W4A16_AWQ has groups.*group_size of 128"):
        MODELOPT.stored(get_format("int4", CHANNEL), None)


def test_channels_of_experts_are_refused():
    with pytest.raises(FormatError, match=r"for dense layers.*experts fp8 with fp8 inputs"):
        MODELOPT.stored(*exported.formats("fp8_channel"), Layer.EXPERT)


def test_blocks_of_a_whole_model_with_experts_are_refused():
    with pytest.raises(FormatError, match=r"experts.*no FP8_PB_WO experts.*export fp8"):
        MODELOPT.quantization_config(exported.plan("fp8_block"))
    with pytest.raises(FormatError, match="export fp8"):
        MODELOPT.extra_files(exported.plan("fp8_block"))


# JSON


@pytest.mark.parametrize("choice", CHOICES)
def test_both_files_say_the_same(choice):
    quant = exported.written_plan("modelopt", choice)
    config, files = MODELOPT.quantization_config(quant), MODELOPT.extra_files(quant)
    assert config["quant_algo"] == ALGORITHMS[choice]
    always = ["model.embed_tokens", "model.layers.0.mlp.gate", "lm_head"]
    assert [n for n in config["ignore"] if "experts" not in n] == always
    assert MODELOPT.check_extra_files(config, files) == ()
    theirs = convert_hf_quant_config_format(files[HF_QUANT_CONFIG])
    if choice in ("int4", "w4a8"):  # ModelOpt leaves the group size out of these
        assert config.pop("config_groups")["group_0"]["weights"]["group_size"] == 128
    assert config == theirs


@pytest.mark.parametrize("choice", CHOICES)
def test_kv_cache_is_declared(choice):
    quant = replace(exported.written_plan("modelopt", choice), kv_cache="fp8")
    config, files = MODELOPT.quantization_config(quant), MODELOPT.extra_files(quant)
    assert files[HF_QUANT_CONFIG]["quantization"]["kv_cache_quant_algo"] == "FP8"
    theirs = convert_hf_quant_config_format(files[HF_QUANT_CONFIG])
    assert config["kv_cache_scheme"] == theirs["kv_cache_scheme"]
    assert MODELOPT.check_extra_files(config, files) == ()
    assert MODELOPT.read_kv_cache(config) == "fp8"
    config["kv_cache_scheme"] = None
    assert MODELOPT.read_kv_cache(config) == ""
    (problem,) = MODELOPT.check_extra_files(config, files)
    assert "kv_cache_quant_algo" in problem


def test_scales_of_the_kv_cache():
    keys, values = MODELOPT.cache_scales
    assert (keys.suffix, values.suffix) == ("k_proj.k_scale", "v_proj.v_scale")
    assert keys.shape(0, 0) == () and keys.dtype == torch.float32


def test_nested_keys_that_vllm_requires():
    for choice in ("nvfp4", "nvfp4 weights", "mxfp8"):
        quantization = MODELOPT.extra_files(exported.plan(choice))[HF_QUANT_CONFIG]["quantization"]
        assert quantization["group_size"] == exported.formats(choice)[0].group_size
        assert {"kv_cache_quant_algo", "exclude_modules"} <= quantization.keys()
    nested = MODELOPT.extra_files(exported.plan("fp8"))[HF_QUANT_CONFIG]
    assert "group_size" not in nested["quantization"]


def test_excluded_layers_are_listed_by_name():
    quant = exported.plan("nvfp4", keep=lambda m: "self_attn" in m)
    names = MODELOPT.quantization_config(quant)["ignore"]
    assert {f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"} < set(names)
    assert len(names) == len(set(names)) == 7


@pytest.mark.parametrize("choice", CHOICES)
def test_config_is_read_back(choice):
    quant = exported.plan(choice, keep=lambda m: m.endswith("o_proj") or "experts" in m)
    found = MODELOPT.read_config(MODELOPT.quantization_config(quant), NAMES)
    wanted = {n for d in quant.quantized for n in d.slot.sources}
    assert found == dict.fromkeys(wanted, ModuleFormat(*exported.formats(choice)))


def test_block_weights_alone_are_the_same_checkpoint():
    """Whatever reads FP8_PB_WO quantizes the inputs as they come, and so does evaluation."""
    slot, block = Slot(name="a.weight", sources=("a",), shape=(128, 128)), get_format("fp8_block")
    quant = QuantPlan("test", (Decision(slot=slot, rule="test", weights=block),))
    config = MODELOPT.quantization_config(quant)
    assert config["quant_algo"] == "FP8_PB_WO"
    found = MODELOPT.read_config(config | {"quant_algo": "fp8_pb_wo"}, ("a",))
    assert found == {"a": ModuleFormat(block, get_format("fp8_group"))}


def test_group_size_is_read_back():
    fmt = get_format("int4", 32)
    slot = Slot(name="a.weight", sources=("a",), shape=(64, 64))
    quant = QuantPlan("test", (Decision(slot=slot, rule="test", weights=fmt),))
    found = MODELOPT.read_config(MODELOPT.quantization_config(quant), ("a", "lm_head"))
    assert found == {"a": ModuleFormat(fmt, None)}


def test_modelopts_wildcards_are_read():
    config = convert_hf_quant_config_format(
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.1*"]}}
    )
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head")
    assert list(MODELOPT.read_config(config, names)) == ["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_algo": "W8A16"}, "'W8A16' is not read; known: FP8, FP8_PER.*MIXED"),
        ({"config_groups": {"g": {"weights": {"group_size": 7}}}}, "group_size 7"),
    ],
)
def test_config_that_is_not_read(change, message):
    config = MODELOPT.quantization_config(exported.plan("nvfp4")) | change
    with pytest.raises(CheckpointError, match=message):
        MODELOPT.read_config(config, NAMES)


def test_cache_that_is_not_read():
    with pytest.raises(CheckpointError, match="kv_cache_scheme 'NVFP4' is not read"):
        MODELOPT.read_kv_cache({"kv_cache_scheme": "NVFP4"})


# Mixed precision


@pytest.mark.parametrize(
    "choices",
    [
        ("fp8", "nvfp4"),
        ("fp8", "nvfp4 weights"),
        ("fp8", "fp8_block"),
        ("fp8_channel", "mxfp8", "fp8_block"),
        ("int4", "nvfp4"),
    ],
)
def test_mixed_precision(choices):
    quant = mixed(*choices)
    config, files = MODELOPT.quantization_config(quant), MODELOPT.extra_files(quant)
    assert config["quant_algo"] == "MIXED_PRECISION" and config["ignore"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt has no group for FP8_PB_WO
        assert config == convert_hf_quant_config_format(files[HF_QUANT_CONFIG])
    layers = config["quantized_layers"]
    attention = layers["model.layers.0.self_attn.q_proj"]
    assert attention["quant_algo"] == ALGORITHMS[choices[0]]
    expert = layers["model.layers.0.mlp.experts.1.up_proj"]
    assert expert["quant_algo"] == ALGORITHMS[choices[1]]
    assert "model.layers.0.mlp.gate" not in layers and "lm_head" not in layers
    assert MODELOPT.check_extra_files(config, files) == ()
    found = MODELOPT.read_config(config, NAMES)
    wanted = {n: ModuleFormat(d.weights, d.inputs) for d in quant.quantized for n in d.slot.sources}
    assert found == wanted


def test_mixed_files_that_contradict():
    quant = mixed("fp8", "nvfp4")
    config, files = MODELOPT.quantization_config(quant), MODELOPT.extra_files(quant)
    files[HF_QUANT_CONFIG]["quantization"]["quantized_layers"] = {}
    (problem,) = MODELOPT.check_extra_files(config, files)
    assert "quantized_layers" in problem


def test_other_names_of_block_fp8_are_read():
    config = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}
    config["quantized_layers"] = {"a": {"quant_algo": "FP8_BLOCK_SCALES"}}
    found = MODELOPT.read_config(config, ("a", "b"))
    assert found == {"a": ModuleFormat(*exported.formats("fp8_block"))}


# Plans that are refused


def test_nothing_quantized():
    with pytest.raises(FormatError, match="quantizes no weight"):
        MODELOPT.quantization_config(exported.plan("fp8", keep=lambda m: True))


def test_some_of_a_layers_experts():
    quant = exported.plan("nvfp4", keep=lambda m: "experts.0" in m)
    with pytest.raises(
        FormatError, match=r"experts\.1.*experts\.0.*all of a layer's experts or none"
    ):
        MODELOPT.quantization_config(quant)


def dense(*excluded: str) -> QuantPlan:
    weights, inputs = exported.formats("fp8")
    mlp = "model.layers.0.mlp"
    slots = [
        Slot(name="fc1.weight", sources=(f"{mlp}.gate_proj", f"{mlp}.up_proj"), shape=(64, 64)),
        Slot(name="fc2.weight", sources=(f"{mlp}.down_proj",), shape=(64, 64)),
    ]
    kept = [Slot(name=f"{n}.weight", sources=(n,), shape=(4, 64), fixed="router") for n in excluded]
    decisions = [Decision(slot=s, rule="test", weights=weights, inputs=inputs) for s in slots]
    return QuantPlan("test", (*decisions, *(Decision(slot=s, rule="test") for s in kept)))


@pytest.mark.parametrize(
    ("excluded", "hit"),
    [
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"),
        ("model.layers.0.mlp.gate_up", "model.layers.0.mlp.gate_up_proj"),
        ("layers.0.mlp.down", "model.layers.0.mlp.down_proj"),
    ],
)
def test_excluded_name_in_a_quantized_one(excluded, hit):
    with pytest.raises(FormatError, match=f"quantized {hit} unquantized.* {excluded} "):
        MODELOPT.quantization_config(dense(excluded))


def test_excluded_name_of_another_layer():
    MODELOPT.quantization_config(dense("model.layers.10.mlp.gate"))


def test_unknown_dialect():
    with pytest.raises(FormatError, match="'gguf'; known: modelopt, compressed-tensors, gptq"):
        get_dialect("gguf")
