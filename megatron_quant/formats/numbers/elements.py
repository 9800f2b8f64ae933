"""Round single elements: fp32 quotients in, element codes out, and back.

All rounding is to nearest, ties to the even code. Every function sees the quotient
``value / scale``, and none of them knows what a scale is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_quant.formats.numbers.pack import nibble_values, pack_nibbles
from megatron_quant.native import Code

E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
E2M1_MAX = 6.0
INT4_MIN, INT4_MAX = -8.0, 7.0
INT8_MIN, INT8_MAX = -128.0, 127.0

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = _E2M1 + tuple(-v for v in _E2M1)
"""Value of each E2M1 code; code 8 is negative zero."""

INT4_VALUES = tuple(float(c - 8) for c in range(16))
"""Value of each unsigned INT4 code."""

# One ulp of an fp32 in [2^23, 2^24) is 1. Adding this rounds to an integer, ties to even, and
# leaves that integer in the low bits of the sum.
_ROUND = 1.5 * 2**23
_ROUND_0, _ROUND_4 = torch.tensor(_ROUND), torch.tensor(_ROUND + 4)


def _low_byte(rounded: Tensor) -> Tensor:
    """Return the integers that sums with _ROUND (fp32) were rounded to, uint8."""
    return rounded.view(torch.int32).to(torch.uint8)


def e4m3(quotient: Tensor) -> Tensor:
    """Round floats [...] (overwritten) to float8_e4m3fn, saturating at +-448; NaN stays NaN."""
    # The cast alone gives NaN above 464 in some torch versions and 448 in others.
    return quotient.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


@cache
def _e4m3_table(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def e4m3_values(elements: Tensor) -> Tensor:
    """Return the values of float8_e4m3fn [...] as fp32.

    A table is 6x faster than torch's cast.
    """
    index = elements.reshape(-1).view(torch.uint8).to(torch.int32)
    return _e4m3_table(elements.device).index_select(0, index).view(elements.shape)


def e2m1_codes(quotient: Tensor) -> Tensor:
    """Round fp32 [...] (overwritten) to E2M1 codes 0..15, uint8 [...], saturating at +-6.

    Negative quotients that round to zero give code 8, and a quotient of -0.0 gives code 0, like
    ModelOpt's ``NVFP4QTensor``. The code of a NaN is arbitrary.
    """
    # Codes lie on three lines: slope 2 below 2, slope 1 below 4, slope 1/2 above. The lowest of
    # the three is the right one everywhere, also at ties.
    magnitude = quotient.abs()
    code = torch.add(_ROUND_0, magnitude, alpha=2.0)
    torch.minimum(code, magnitude + (_ROUND + 2), out=code)
    torch.minimum(code, torch.add(_ROUND_4, magnitude, alpha=0.5), out=code)
    code.clamp_(max=_ROUND + 7)
    return _low_byte(code.add_(quotient.lt_(0), alpha=8.0))


def int4_codes(quotient: Tensor) -> Tensor:
    """Round fp32 [...] (overwritten) to INT4 codes (value + 8) 0..15, uint8 [...], saturating."""
    return _low_byte(quotient.clamp_(INT4_MIN, INT4_MAX).add_(_ROUND + 8))


def int8_codes(quotient: Tensor) -> Tensor:
    """Round floats [...] (overwritten) to int8 [...], saturating.

    The code of a NaN is arbitrary.
    """
    return quotient.clamp_(INT8_MIN, INT8_MAX).round_().to(torch.int8)


@dataclass(frozen=True)
class Element:
    """How elements are stored along K: rounding and packing, and reading back.

    Attributes:
        packed: Number of elements in a stored one.
        code: Name of the element in the compiled loops.
        store: Quotients [R, K] (overwritten), K a multiple of ``packed``, -> [R, K / packed].
        load: Stored elements -> their values, fp32 [R, K].
    """

    packed: int
    code: Code
    store: Callable[[Tensor], Tensor]
    load: Callable[[Tensor], Tensor]


E4M3 = Element(1, Code.E4M3, e4m3, e4m3_values)
INT8 = Element(1, Code.INT8, int8_codes, Tensor.float)
E2M1 = Element(
    2,
    Code.E2M1,
    lambda q: pack_nibbles(e2m1_codes(q.float())),
    lambda bytes_: nibble_values(bytes_, E2M1_VALUES),
)
INT4 = Element(
    8,
    Code.INT4,
    lambda q: pack_nibbles(int4_codes(q.float())).view(torch.int32),
    lambda words: nibble_values(words.view(torch.uint8), INT4_VALUES),
)
INT8_WORDS = Element(
    4,
    Code.UINT8,
    lambda q: (int8_codes(q).view(torch.uint8) ^ 128).view(torch.int32),
    lambda words: (words.view(torch.uint8) ^ 128).view(torch.int8).float(),
)
