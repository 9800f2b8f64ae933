"""Elements and codes, as csrc numbers them."""

from enum import IntEnum

import torch


class CElement(IntEnum):
    """How a quotient becomes an element, in the numbering of csrc/elements.h.

    BY_BF16 rounds the quotient to bf16 first, as torch does where value and step are both bf16.
    ZERO adds a zero point. UINT8 is INT8 + 128.
    """

    E4M3 = 0
    E4M3_BY_BF16 = 1
    E2M1 = 2
    E2M1_BY_BF16 = 3
    INT4_BY_BF16 = 4
    INT4_ZERO_BY_BF16 = 5
    INT8 = 6
    UINT8_BY_BF16 = 7


class Code(IntEnum):
    """The kind of stored elements, in the numbering of csrc/decode.c.

    INT4 is + 8, UINT8 is INT8 + 128.
    """

    E4M3 = 0
    E2M1 = 1
    INT4 = 2
    INT8 = 3
    UINT8 = 4


STORED = {
    CElement.E4M3: torch.float8_e4m3fn,
    CElement.E4M3_BY_BF16: torch.float8_e4m3fn,
    CElement.E2M1: torch.uint8,
    CElement.E2M1_BY_BF16: torch.uint8,
    CElement.INT4_BY_BF16: torch.int32,
    CElement.INT4_ZERO_BY_BF16: torch.int32,
    CElement.INT8: torch.int8,
    CElement.UINT8_BY_BF16: torch.int32,
}
"""Dtype in which elements are stored."""


def in_byte(element: CElement) -> int:
    """Return how many elements a byte holds."""
    bytes_ = (CElement.E4M3, CElement.E4M3_BY_BF16, CElement.INT8, CElement.UINT8_BY_BF16)
    return 1 if element in bytes_ else 2
