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
from megatron_quant.native import Cuts, Origin

SIGNED = ("int4",)
"""Formats whose scales may be below 0, in checkpoints or by ``Format.signed``."""


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
    sign = _signs(w, fmt, scales, origin)
    positive = scales if sign is None else _positive(scales)
    w = _divided_exactly(w, fmt) if sign is None else _divided_exactly(w, fmt) * sign
    w_RK = as_rows(w)
    elements, _ = encode_rows(w_RK, rows_on(w, fmt, positive, origin))
    if kernel_of(fmt).element is E2M1:
        elements = elements | _negative_zeros(w_RK)
    return {fmt.fields[0].name: elements.view(*w.shape[:-1], elements.shape[-1]), **scales}


def fake_quant_on(
    x: Tensor, fmt: Format, scales: Mapping[str, Tensor], origin: Origin = (0, 0)
) -> Tensor:
    """Round ``x`` [N, K] or [E, N, K] to the nearest values on the grid, in its own dtype.

    The gradient of ``x`` passes unchanged; scales get none.
    """
    wide, sign = _divided_exactly(x, fmt), _signs(x, fmt, scales, origin)
    if sign is not None:
        wide, scales = wide * sign, _positive(scales)
    with torch.no_grad():
        rows = rows_on(wide, fmt, scales, origin)
    rounded = straight_through(wide, rows)
    return (rounded if sign is None else rounded * sign).to(x.dtype)


def _signs(x: Tensor, fmt: Format, scales: Mapping[str, Tensor], origin: Origin) -> Tensor | None:
    """Return the sign of the scale of each element; None where no scale is below 0.

    AutoRound's INT4 has such scales. A code of a value by one is that of the value's opposite by
    the opposite scale, which every loop takes.
    """
    scale = scales.get("scale")
    if fmt.name not in SIGNED or scale is None or not bool((scale < 0).any()):
        return None
    columns = Cuts.of(x.shape[-1], fmt.field("scale").block[1], origin[1])
    signs = torch.where(scale < 0, -1.0, 1.0).to(x.dtype)
    return signs[..., columns.index(1, x.device)]


def _positive(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**scales, "scale": scales["scale"].abs()}


def _divided_exactly(x: Tensor, fmt: Format) -> Tensor:
    """Return ``x``, widened if dividing it in its own dtype loses codes."""
    return x.float() if fmt.arithmetic.divide == "by_bf16" and fmt.bits == 8 else x


def _negative_zeros(w_RK: Tensor) -> Tensor:
    """Return the sign bits of the elements that are -0.0, two codes a byte."""
    signs = (torch.signbit(w_RK) & (w_RK == 0)).to(torch.uint8) * 8
    return pack_nibbles(signs)
