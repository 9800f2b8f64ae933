"""Quantized grouped linears alone, and plain code for what they should compute.

Import it in functions that run under the ``ranks`` fixture.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TERowParallelGroupedLinear,
)
from megatron.core.transformer import TransformerConfig
from modelopt.torch.quantization.nn import QuantModuleRegistry

from megatron_quant.formats import Format, amax, fake_quant, tensor_scale
from megatron_quant.layers import register
from megatron_quant.layers.backend import quantizer_attributes
from megatron_quant.layers.grouped import QuantGroupedLinear
from tests.dist import tiny

register()
CLASSES = {"column": TEColumnParallelGroupedLinear, "row": TERowParallelGroupedLinear}
N, K = 48, 128


def plain(
    kind: str,
    experts: int,
    dtype: torch.dtype = torch.float32,
    config: TransformerConfig | None = None,
) -> torch.nn.Module:
    """Megatron's grouped linear [N, K] with seeded random weights, some experts' much larger."""
    config = config or tiny.config(max(experts, 2), params_dtype=dtype)
    layer = CLASSES[kind](
        experts,
        K,
        N,
        config=config,
        init_method=torch.nn.init.normal_,
        bias=False,
        skip_bias_add=False,
        is_expert=True,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in range(experts):
            values = torch.randn(N, K, generator=generator) * 2.0 ** (i % 5)
            getattr(layer, f"weight{i}").copy_(values)
    return layer.to(dtype)


def quantized(
    kind: str, experts: int, fmt: Format, axis: int | None, dtype: torch.dtype = torch.float32
) -> QuantGroupedLinear:
    """The same, converted and with the weight amaxes in place; inputs are not quantized."""
    return converted(plain(kind, experts, dtype), fmt, axis)


def converted(layer: torch.nn.Module, fmt: Format, axis: int | None) -> QuantGroupedLinear:
    """``layer`` with quantized weights alone, as :func:`quantized` gives it."""
    layer = QuantModuleRegistry.convert(layer)
    layer.input_quantizer.disable()
    layer.weight_quantizer.set_from_attribute_config(quantizer_attributes(fmt, axis))
    layer.weight_quantizer.amax = weight_amax(layer.weights(), axis)
    return layer


def weight_amax(weights: Sequence[torch.Tensor], axis: int | None) -> torch.Tensor:
    own = torch.stack([amax(w.detach()) for w in weights])
    return own.max() if axis is None else own.view(-1, 1, 1)


def quantize_inputs(layer: QuantGroupedLinear, fmt: Format, x: torch.Tensor) -> None:
    layer.input_quantizer.set_from_attribute_config(quantizer_attributes(fmt))
    layer.input_quantizer.enable()
    layer.input_quantizer.amax = amax(x)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def expected(
    x: torch.Tensor, weights: Sequence[torch.Tensor], splits: Sequence[int]
) -> torch.Tensor:
    """One F.linear an expert."""
    parts = zip(x.split(list(splits)), weights, strict=True)
    return torch.cat([F.linear(part, w) for part, w in parts])


def fake_quantized(
    weights: Sequence[torch.Tensor], fmt: Format, axis: int | None
) -> list[torch.Tensor]:
    """Each weight alone through the format, with a straight-through gradient."""
    amaxes = weight_amax(weights, axis).expand(len(weights), 1, 1)
    scales = [tensor_scale(a.reshape(()), fmt) if fmt.tensor_scale else None for a in amaxes]
    return [fake_quant(w, fmt, s) for w, s in zip(weights, scales, strict=True)]
