"""Round tensors to what a format can hold, without making the bytes."""

from typing import Any

import torch
from torch import Tensor

from megatron_quant.formats.backends import loops_for
from megatron_quant.formats.blocks import Rows, as_rows, check_storable, row_chunks, rows_of
from megatron_quant.formats.spec import Format
from megatron_quant.native import Origin


def _quantized(x: Tensor, rows: Rows) -> Tensor:
    x_RK = as_rows(x)
    if loops_for(x_RK) is not None:  # cuts the rows by itself
        return rows.requantize(slice(None), x_RK).to(x.dtype).view(x.shape)
    out_RK = torch.empty_like(x_RK)
    for chunk in row_chunks(x_RK):
        out_RK[chunk] = rows.requantize(chunk, x_RK[chunk])
    return out_RK.view(x.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        return _quantized(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_quant(
    x: Tensor,
    fmt: Format,
    dscale: Tensor | None,
    stat: Tensor | None = None,
    origin: Origin = (0, 0),
) -> Tensor:
    """Return ``decode(encode(x))`` bit for bit, in the shape and dtype of ``x``, piece by piece.

    The gradient of ``x`` passes unchanged, also where values saturate (Bengio et al., 2013). The
    other arguments get none.

    Args:
        x: bf16, fp16 or fp32 [..., K]; weights or activations, empty ones too.
        fmt: The format to round to.
        dscale: fp32 [], or [E, 1, 1] where ``x`` is [E, N, K]; ignored where ``fmt.tensor_scale``
            is False.
        stat: Statistic of the blocks, as ``encode`` takes it.
        origin: Row and column of the logical tensor at which ``x`` starts.

    Raises:
        FormatError: Where ``encode`` raises it.
    """
    check_storable(x, fmt, stat, origin)
    with torch.no_grad():
        rows = rows_of(x, fmt, dscale, stat, origin)
    return straight_through(x, rows)


def straight_through(x: Tensor, rows: Rows) -> Tensor:
    """Round ``x`` to what ``rows`` can store, and pass its gradient unchanged."""
    stored: Tensor = _StraightThrough.apply(x, rows)
    return stored
