import json

import pytest
import torch

from megatron_quant.ckpt.dialects.base import Layer, ModuleFormat
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import get_format
from megatron_quant.recipes.plan import QuantPlan
from tests.unit import exported

NATIVE = get_dialect("fp8")
NAMES = tuple(s.module for p in exported.PARAMS for s in p.sources if len(s.shape) == 2)
BLOCK = ModuleFormat(*exported.formats("fp8_block"))


@pytest.mark.parametrize("layer", Layer)
def test_tensors(layer):
    weight, scale = NATIVE.stored(*exported.formats("fp8_block"), layer)
    assert (weight.suffix, weight.dtype) == ("weight", torch.float8_e4m3fn)
    assert (scale.suffix, scale.dtype) == ("weight_scale_inv", torch.float32)
    assert scale.shape(200, 384) == (2, 3)


def test_the_scale_multiplies():
    w_NK = torch.full((128, 128), 896.0)
    fmt, inputs = exported.formats("fp8_block")
    disk = exported.stored_tensors(w_NK, fmt, inputs, NATIVE.stored(fmt, inputs))
    assert disk["weight_scale_inv"].tolist() == [[2.0]]
    assert (disk["weight"].float() == 448).all()


def test_config():
    config = json.loads(json.dumps(NATIVE.quantization_config(exported.plan("fp8_block"))))
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.embed_tokens", "model.layers.0.mlp.gate", "lm_head"],
    }
    found = NATIVE.read_config(config, NAMES)
    quantized = (n for d in exported.plan("fp8_block").quantized for n in d.slot.sources)
    assert found == dict.fromkeys(quantized, BLOCK)


def test_exclusions_end_at_a_dot_as_transformers_has_them():
    config = NATIVE.quantization_config(exported.plan("fp8_block"))
    config["modules_to_not_convert"] = ["model.mlp.gate", "o_proj", "model.layers.1"]
    names = ("model.mlp.gate_proj", "model.mlp.gate", "a.o_proj", "model.layers.1.a")
    found = NATIVE.read_config(config, (*names, "model.layers.10.a"))
    assert list(found) == ["model.mlp.gate_proj", "model.layers.10.a"]
    config["ignored_layers"] = config.pop("modules_to_not_convert")
    assert NATIVE.read_config(config, names) == {"model.mlp.gate_proj": BLOCK}


@pytest.mark.parametrize(
    "change",
    [{"weight_block_size": [64, 64]}, {"activation_scheme": "static"}, {"fmt": "e5m2"}],
)
def test_config_that_is_not_read(change):
    config = NATIVE.quantization_config(exported.plan("fp8_block")) | change
    with pytest.raises(CheckpointError, match=r"is not read; known: e4m3, dynamic, \[128, 128\]"):
        NATIVE.read_config(config, NAMES)


@pytest.mark.parametrize(
    ("weights", "inputs", "instead"),
    [
        ("fp8_block", None, "add inputs: fp8_group"),
        ("fp8", "fp8", "take that, or export compressed-tensors"),
    ],
)
def test_formats_that_are_refused(weights, inputs, instead):
    with pytest.raises(FormatError, match=f"fp8 export has no {weights} .*: {instead}"):
        NATIVE.stored(get_format(weights), get_format(inputs) if inputs else None)


def test_mixed_precision_is_refused():
    plans = zip(*(exported.plan(c).decisions for c in ("fp8", "fp8_block")), strict=True)
    quant = QuantPlan("m", tuple(b if "experts" in b.slot.name else a for a, b in plans))
    with pytest.raises(FormatError, match="a fp8 checkpoint has one format"):
        NATIVE.quantization_config(quant)
