import pytest
import torch

from megatron_quant.ckpt.dialects import get_dialect
from megatron_quant.ckpt.dialects.base import ModuleFormat
from megatron_quant.ckpt.dialects.modelopt import HF_QUANT_CONFIG
from megatron_quant.ckpt.dialects.row_pairs import bytes_to_int4, int4_to_bytes
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import amax, decode, encode, get_format, tensor_scale
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot
from tests.host import ready
from tests.unit import exported

ready()

from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format  # noqa: E402
from modelopt.torch.export.quant_utils import (  # noqa: E402
    pack_int4_in_uint8,
    to_quantized_weight,
)
from modelopt.torch.quantization.qtensor import NVFP4QTensor  # noqa: E402

MODELOPT = get_dialect("modelopt")
CHOICES = ["fp8", "nvfp4", "nvfp4 weights", "int4"]
ALGORITHMS = dict(zip(CHOICES, ["FP8", "NVFP4", "W4A16_NVFP4", "W4A16_AWQ"], strict=True))
NAMES = tuple(s.module for p in exported.PARAMS for s in p.sources if len(s.shape) == 2)


def a_weight() -> torch.Tensor:
    w_NK = exported.source_weights()["model.layers.0.mlp.experts.1.down_proj.weight"]
    w_NK[0, :16] = 0
    w_NK[1] *= 1e-3
    return w_NK


def on_disk(w_NK: torch.Tensor, choice: str) -> exported.Tensors:
    fmt, inputs = exported.formats(choice)
    dscale = tensor_scale(amax(w_NK), fmt) if fmt.tensor_scale else None
    input_dscale = tensor_scale(exported.INPUT_AMAX, inputs) if inputs else None
    return exported.stored_tensors(w_NK, fmt, dscale, input_dscale, MODELOPT.stored(fmt, inputs))


# Bytes


def test_fp8_is_modelopts():
    w_NK = a_weight()
    stored = on_disk(w_NK, "fp8")
    scale = amax(w_NK) / 448
    assert torch.equal(stored["weight_scale"], scale) and stored["weight_scale"].shape == ()
    assert torch.equal(stored["input_scale"], exported.INPUT_AMAX / 448)
    theirs = to_quantized_weight(w_NK, scale, "fp8")
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
    fields = encode(w_NK, fmt, None)
    stored = exported.stored_tensors(w_NK, fmt, None, None, MODELOPT.stored(fmt, None))
    decoded = decode(fields, fmt, torch.float32)
    theirs = pack_int4_in_uint8(decoded, stored["weight_scale"], group)
    assert stored["weight"].shape == (64, 128) and stored["weight_scale"].dtype == torch.float32
    assert torch.equal(stored["weight"], theirs)


def test_int4_bytes_round_trip():
    words = torch.randint(-(2**31), 2**31, (6, 5), dtype=torch.int64).to(torch.int32)
    packed = int4_to_bytes(words)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 40)
    assert torch.equal(bytes_to_int4(packed), words)


def test_int4_bytes_commute_with_slices():
    words = torch.randint(-(2**31), 2**31, (6, 5), dtype=torch.int64).to(torch.int32)
    assert torch.equal(int4_to_bytes(words[2:6, 1:3]), int4_to_bytes(words)[1:3, 8:24])


def test_int4_of_odd_rows_is_refused():
    with pytest.raises(FormatError, match="3 rows are odd"):
        int4_to_bytes(torch.zeros(3, 1, dtype=torch.int32))


@pytest.mark.parametrize("choice", CHOICES)
def test_shapes_are_those_written(choice):
    stored = on_disk(a_weight(), choice)
    for s in MODELOPT.stored(*exported.formats(choice)):
        assert stored[s.suffix].shape == s.shape(128, 128), s.suffix
        assert stored[s.suffix].dtype == s.dtype


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        ("fp8", None, "input scale.*calibrate.*compressed-tensors"),
        ("int4", "fp8", "no int4 .* with fp8 inputs; it writes FP8, NVFP4"),
        ("fp8", "nvfp4", "no fp8 weights with nvfp4 inputs"),
    ],
)
def test_formats_without_algorithm(weights, inputs, message):
    with pytest.raises(FormatError, match=message):
        MODELOPT.stored(get_format(weights), get_format(inputs) if inputs else None)


# JSON


@pytest.mark.parametrize("choice", CHOICES)
def test_both_files_say_the_same(choice):
    quant = exported.plan(choice)
    config, files = MODELOPT.quantization_config(quant), MODELOPT.extra_files(quant)
    assert config["quant_algo"] == ALGORITHMS[choice]
    assert config["ignore"] == ["model.embed_tokens", "model.layers.0.mlp.gate", "lm_head"]
    assert MODELOPT.check_extra_files(config, files) == ()
    theirs = convert_hf_quant_config_format(files[HF_QUANT_CONFIG])
    if choice == "int4":  # ModelOpt leaves the group size out of this one
        assert config.pop("config_groups")["group_0"]["weights"]["group_size"] == 128
    assert config == theirs


def test_nested_keys_that_vllm_requires():
    for choice in ("nvfp4", "nvfp4 weights"):
        quantization = MODELOPT.extra_files(exported.plan(choice))[HF_QUANT_CONFIG]["quantization"]
        assert quantization["group_size"] == 16
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
    quant = exported.plan(choice, keep=lambda m: m.endswith("o_proj"))
    found = MODELOPT.read_config(MODELOPT.quantization_config(quant), NAMES)
    wanted = {n for d in quant.quantized for n in d.slot.sources}
    assert found == dict.fromkeys(wanted, ModuleFormat(*exported.formats(choice)))


def test_group_size_is_read_back():
    fmt = get_format("int4", 32)
    slot = Slot("a.weight", ("a",), (64, 64))
    quant = QuantPlan("test", (Decision(slot, "test", fmt),))
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
        ({"quant_algo": "MIXED_PRECISION"}, "'MIXED_PRECISION' is not read; known: FP8, NVFP4"),
        ({"kv_cache_scheme": {"type": "float"}}, "kv_cache_scheme"),
        ({"config_groups": {"g": {"weights": {"group_size": 7}}}}, "group_size 7"),
    ],
)
def test_config_that_is_not_read(change, message):
    config = MODELOPT.quantization_config(exported.plan("nvfp4")) | change
    with pytest.raises(CheckpointError, match=message):
        MODELOPT.read_config(config, NAMES)


# Plans that are refused


def test_mixed_precision():
    weights, inputs = exported.formats("nvfp4")
    decisions = list(exported.plan("fp8").decisions)
    at = next(i for i, d in enumerate(decisions) if d.quantized)
    decisions[at] = Decision(decisions[at].slot, "test", weights, inputs)
    with pytest.raises(FormatError, match=r"mixed precision.*'odd' has nvfp4.*fp8"):
        MODELOPT.quantization_config(QuantPlan("odd", tuple(decisions)))


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
        Slot("fc1.weight", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), (64, 64)),
        Slot("fc2.weight", (f"{mlp}.down_proj",), (64, 64)),
    ]
    kept = [Slot(f"{n}.weight", (n,), (4, 64), "router") for n in excluded]
    decisions = [Decision(s, "test", weights, inputs) for s in slots]
    return QuantPlan("test", (*decisions, *(Decision(s, "test") for s in kept)))


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
    with pytest.raises(FormatError, match="'gguf'; known: modelopt, compressed-tensors"):
        get_dialect("gguf")
