"""The error of a format without its bytes: what decoding an encoded tensor would give."""

from typing import Any

import torch
from torch import Tensor

from megatron_quant.formats.chunks import as_rows, row_chunks
from megatron_quant.formats.codec import check_storable, row_scale
from megatron_quant.formats.kernels import kernel_of
from megatron_quant.formats.spec import Format


def _quantized(x: Tensor, fmt: Format, dscale: Tensor | None) -> Tensor:
    x_RK, dscale_R1, kernel = as_rows(x), row_scale(dscale, x, fmt), kernel_of(fmt)
    out_RK = torch.empty_like(x_RK)
    for chunk in row_chunks(x_RK):
        rows = dscale_R1[chunk]
        out_RK[chunk] = kernel.decode(kernel.encode(x_RK[chunk], rows), rows)
    return out_RK.view(x.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format, dscale: Tensor | None) -> Tensor:
        return _quantized(x, fmt, dscale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def fake_quant(x: Tensor, fmt: Format, dscale: Tensor | None) -> Tensor:
    """``decode(encode(x))`` bit for bit, in the shape and dtype of ``x``, piece by piece.

    x: bf16, fp16 or fp32 [..., K]; weights or activations, empty ones too.
    dscale: fp32 [], or [E, 1, 1] where x is [E, N, K]; ignored where ``fmt.tensor_scale`` is
        False. Gets no gradient.
    The gradient of ``x`` passes unchanged, also where values saturate (Bengio et al., 2013).
    Raises FormatError as ``encode`` does.
    """
    check_storable(x, fmt)
    return _StraightThrough.apply(x, fmt, dscale)
