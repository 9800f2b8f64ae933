"""transformers' own readers on what the dialects write, against a model of the decoded weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.evaluation.load import decoded
from megatron_quant.models.registry import lookup
from megatron_quant.recipes.plan import QuantPlan
from tests.unit import exported

DENSE = exported.CONFIG | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "intermediate_size": 256,
}
IDS = torch.arange(24)[None] % 64
WEIGHTS_ALONE, INPUTS, CLIPPED, FP4_INPUTS = 0.02, 0.15, 0.25, 0.5
"""How far logits may be: rounding to bf16, and what the rounding of activations adds, with scales
that were calibrated and with those of the tests."""
DENSE_CELLS = {
    ("fp8", "fp8_block"): WEIGHTS_ALONE,  # activations are not quantized on CPU
    ("compressed-tensors", "fp8"): CLIPPED,
    ("compressed-tensors", "fp8 weights"): WEIGHTS_ALONE,
    ("compressed-tensors", "fp8_channel"): INPUTS,
    ("compressed-tensors", "fp8_block"): INPUTS,
    ("compressed-tensors", "int8"): INPUTS,
    ("compressed-tensors", "int8_group"): WEIGHTS_ALONE,
    ("compressed-tensors", "int4"): WEIGHTS_ALONE,
    ("compressed-tensors", "w4a8"): CLIPPED,
    ("compressed-tensors", "w4a8_dynamic"): INPUTS,
    ("compressed-tensors", "nvfp4"): FP4_INPUTS,
    ("compressed-tensors", "nvfp4 weights"): WEIGHTS_ALONE,
    ("compressed-tensors", "mxfp8"): INPUTS,
    ("compressed-tensors", "mxfp4 weights"): WEIGHTS_ALONE,
}
MOE_CELLS = {
    ("fp8", "fp8_block"): WEIGHTS_ALONE,
    ("compressed-tensors", "fp8_channel"): INPUTS,
    ("compressed-tensors", "int4"): WEIGHTS_ALONE,
    ("compressed-tensors", "mxfp4 weights"): WEIGHTS_ALONE,
}


def weights_of(model: dict[str, Any]) -> exported.Tensors:
    """Weights with which activations keep their size."""
    drawn = exported.source_weights(lookup(model).params(model))
    return {
        n: torch.ones_like(w) if w.dim() == 1 else w / (w.float().std() * math.sqrt(w.shape[1]))
        for n, w in drawn.items()
    }


def logits(directory: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    with torch.inference_mode():
        return model(IDS).logits[0].float()


def distance(directory: Path, model: dict[str, Any], **options: Any) -> float:
    checkpoint = QuantizedCheckpoint(directory)
    plain = {name: checkpoint.weight(name, torch.bfloat16) for name in checkpoint}
    wanted = logits(exported.write(directory.parent / "plain", plain, model))
    return float((logits(directory, **options) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dialect", "choice"), DENSE_CELLS)
def test_dense(tmp_path, dialect, choice):
    quant = exported.plan(choice, params=lookup(DENSE).params(DENSE))
    directory = exported.export(tmp_path / "out", dialect, quant, weights_of(DENSE), DENSE)
    assert distance(directory, DENSE) < DENSE_CELLS[dialect, choice]


@pytest.mark.parametrize(("dialect", "choice"), MOE_CELLS)
def test_experts(tmp_path, dialect, choice):
    model = exported.CONFIG
    directory = exported.export(
        tmp_path / "out", dialect, exported.plan(choice), weights_of(model), model
    )
    assert distance(directory, model) < MOE_CELLS[dialect, choice]


def test_zero_points(tmp_path):
    """They load with dequantize=True alone."""
    quant = exported.plan("int4_asym", params=lookup(DENSE).params(DENSE))
    directory = exported.export(
        tmp_path / "out", "compressed-tensors", quant, weights_of(DENSE), DENSE
    )
    option = CompressedTensorsConfig(dequantize=True)
    assert distance(directory, DENSE, quantization_config=option) < WEIGHTS_ALONE


def test_mixed_precision(tmp_path):
    params = lookup(DENSE).params(DENSE)
    plans = (exported.plan(choice, params=params).decisions for choice in ("fp8_channel", "int4"))
    decisions = (b if "mlp" in b.slot.name else a for a, b in zip(*plans, strict=True))
    quant = QuantPlan("mixed", tuple(decisions))
    directory = exported.export(
        tmp_path / "out", "compressed-tensors", quant, weights_of(DENSE), DENSE
    )
    assert distance(directory, DENSE) < INPUTS


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        ("fp8_channel", torch.float32),
        ("fp8_block", torch.float32),
        ("int8", torch.float32),
        ("mxfp8", torch.bfloat16),
    ],
)
def test_activations_are_quantized_as_transformers_does(tmp_path, choice, dtype):
    """Those whose scales are found as they come too."""
    quant = exported.plan(choice, params=lookup(DENSE).params(DENSE))
    directory = exported.export(
        tmp_path / "out", "compressed-tensors", quant, weights_of(DENSE), DENSE
    )
    ours = decoded(directory, dtype)(IDS[0]).float()
    torch.testing.assert_close(ours, logits(directory, dtype), rtol=0, atol=1e-3)
