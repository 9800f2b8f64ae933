"""Round onto a given grid, whose scales come from elsewhere, such as a released checkpoint.

``scales`` are the fields of a format without its elements, as ``encode`` returns them: those of
every block that the piece touches, and the tensor's scale [] or [E, 1, 1].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_quant.formats.blocks import as_rows, rows_on
from megatron_quant.formats.codec import encode_rows
from megatron_quant.formats.numbers import E2M1, kernel_of, pack_nibbles
from megatron_quant.formats.quantize_dequantize import straight_through
from megatron_quant.formats.spec import Format
from megatron_quant.native import Origin


@torch.no_grad()
def encode_on(
    w: Tensor, fmt: Format, scales: Mapping[str, Tensor], origin: Origin = (0, 0)
) -> dict[str, Tensor]:
    """Encode ``w`` with the given scales; a value on the grid gets the code that it came from.

    Args:
        w: bf16, fp16 or fp32, [N, K] or [E, N, K]. A negative zero keeps its sign where codes
            have one.
        fmt: The format to store.
        scales: Fields of scales and zero points, by name; returned as they are.
        origin: Row and column of the logical tensor at which ``w`` starts.
    """
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
    with torch.no_grad():
        rows = rows_on(x, fmt, scales, origin)
    return straight_through(x, rows)


def _negative_zeros(w_RK: Tensor) -> Tensor:
    """Return the sign bits of the elements that are -0.0, two codes a byte."""
    signs = (torch.signbit(w_RK) & (w_RK == 0)).to(torch.uint8) * 8
    return pack_nibbles(signs)
