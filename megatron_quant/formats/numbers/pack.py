"""Pack two 4-bit codes a byte, and read them by table: the packing of every 4-bit format.

NIB8 keeps the even column in the low nibble. I32-seq (eight codes an int32, element ``i`` at bits
``[4i, 4i + 4)``) has the same bytes, read as little-endian words, and so needs no code of its own.
"""

import sys
from functools import cache

import torch
from torch import Tensor

assert sys.byteorder == "little", "packed words are written as the host's int32"


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes 0..15, uint8 [..., K] (contiguous, K even), to NIB8 uint8 [..., K/2]."""
    pairs = codes.view(torch.int16)  # odd column in the high byte
    return (pairs | (pairs >> 4)).to(torch.uint8)


@cache
def _pair_table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Build int64 [256]: two fp32 values side by side, for each byte of NIB8."""
    one = torch.tensor(values)
    low, high = one.repeat(16), one.repeat_interleave(16)
    return torch.stack((low, high), -1).view(torch.int64).view(-1).to(device)


def nibble_values(packed: Tensor, values: tuple[float, ...]) -> Tensor:
    """Read NIB8 uint8 [..., K/2] as fp32 [..., K], code ``c`` standing for ``values[c]``."""
    index = packed.reshape(-1).to(torch.int32)
    pairs = _pair_table(values, packed.device).index_select(0, index)
    return pairs.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])
