"""Round onto a given grid, whose scales come from elsewhere, such as a released checkpoint.

``scales`` are the fields of a format without its elements, as ``encode`` returns them: those of
every block that the piece touches, and the tensor's scale [] or [E, 1, 1].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_quant.formats.blocks import as_rows, block_stat, rows_of, rows_on
from megatron_quant.formats.codec import encode_rows, named_scales
from megatron_quant.formats.numbers import E2M1, kernel_of, pack_nibbles
from megatron_quant.formats.quantize_dequantize import straight_through
from megatron_quant.formats.spec import Format
from megatron_quant.native import Origin


@torch.no_grad()
def scales_of(
    w: Tensor,
    fmt: Format,
    dscale: Tensor | None,
    stat: Tensor | None = None,
    origin: Origin = (0, 0),
) -> dict[str, Tensor]:
    """Return the fields that ``encode`` gives to ``w``, without its elements.

    Args:
        w: bf16, fp16 or fp32, [N, K] or [E, N, K].
        fmt: The format to store.
        dscale: Scale of the whole tensor, as ``encode`` takes it.
        stat: Statistic of every block that ``w`` touches; found from ``w`` alone where None.
        origin: Row and column of the logical tensor at which ``w`` starts.
    """
    if stat is None and fmt.stat_block is not None:
        stat = block_stat(w, fmt, origin)
    rows = rows_of(w, fmt, dscale, stat, origin)
    return named_scales(w, fmt, rows.scales or (), dscale, origin)


@torch.no_grad()
def encode_on(
    w: Tensor, fmt: Format, scales: Mapping[str, Tensor], origin: Origin = (0, 0)
) -> dict[str, Tensor]:
    """Encode ``w`` with the given scales; a value on the grid gets the code that it came from.

    So does one that bf16 has rounded: eight bits of a code need a division in fp32.

    Args:
        w: bf16, fp16 or fp32, [N, K] or [E, N, K]. A negative zero keeps its sign where codes
            have one.
        fmt: The format to store.
        scales: Fields of scales and zero points, by name; returned as they are.
        origin: Row and column of the logical tensor at which ``w`` starts.
    """
    w = _divided_exactly(w, fmt)
    w_RK = as_rows(w)
    elements, _ = encode_rows(w_RK, rows_on(w, fmt, scales, origin))
    if kernel_of(fmt).element is E2M1:
        elements = elements | _negative_zeros(w_RK)
    return {fmt.fields[0].name: elements.view(*w.shape[:-1], elements.shape[-1]), **scales}


def fake_quant_on(
    x: Tensor, fmt: Format, scales: Mapping[str, Tensor], origin: Origin = (0, 0)
) -> Tensor:
    """Round ``x`` [N, K] or [E, N, K] to the nearest values on the grid, in its own dtype.

    The gradient of ``x`` passes unchanged; scales get none.
    """
    wide = _divided_exactly(x, fmt)
    with torch.no_grad():
        rows = rows_on(wide, fmt, scales, origin)
    return straight_through(wide, rows).to(x.dtype)


def _divided_exactly(x: Tensor, fmt: Format) -> Tensor:
    """Return ``x``, widened if dividing it in its own dtype loses codes."""
    return x.float() if fmt.arithmetic.divide == "by_bf16" and fmt.bits == 8 else x


def _negative_zeros(w_RK: Tensor) -> Tensor:
    """Return the sign bits of the elements that are -0.0, two codes a byte."""
    signs = (torch.signbit(w_RK) & (w_RK == 0)).to(torch.uint8) * 8
    return pack_nibbles(signs)
