"""Pack integer codes in the words of other conventions: along rows, transposed, interleaved.

The codec packs codes along K in order: element ``i`` of a word at bits ``[b * i, b * (i + 1))``.
Everything here is bytes of the little-endian host.
"""

from functools import partial

import torch
from torch import Tensor

from megatron_quant.formats import pack_nibbles

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Slot ``i`` of an AWQ word holds this element of the run of eight."""
_AWQ_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unpack words int32 [..., K * bits / 32] to codes uint8 [..., K]; ``bits`` is 4 or 8."""
    codes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Undo :func:`unpacked`."""
    codes = codes.contiguous()
    return (pack_nibbles(codes) if bits == 4 else codes).view(torch.int32)


def transposed(stored: Tensor) -> Tensor:
    """Transpose [A, B] to [B, A], contiguous.

    Dims of size 1 have the usual strides, which views ask for.
    """
    return stored.t().clone(memory_format=torch.contiguous_format)


def along_rows(codes_NG: Tensor, bits: int = 4) -> Tensor:
    """Pack zeros uint8 [N, G] to int32 [N * bits / 32, G] along rows (compressed-tensors)."""
    return transposed(packed(transposed(codes_NG), bits))


def from_along_rows(words: Tensor, bits: int = 4) -> Tensor:
    """Undo :func:`along_rows`."""
    return transposed(unpacked(transposed(words), bits))


def gptq_zeros(codes_NG: Tensor, offset: int, bits: int = 4) -> Tensor:
    """Pack zeros uint8 [N, G] to int32 [G, N * bits / 32], each stored as ``zero - offset``."""
    return packed((transposed(codes_NG) - offset) & (2**bits - 1), bits)


def from_gptq_zeros(words: Tensor, offset: int, bits: int = 4) -> Tensor:
    """Undo :func:`gptq_zeros`."""
    return transposed((unpacked(words, bits) + offset) & (2**bits - 1))


def constant_zeros(shape: Tensor, bits: int, group_size: int, code: int) -> Tensor:
    """Make zeros of a symmetric weight, all ``code``: int32 [ceil(K / group), N * bits / 32].

    They are equal in every order of packing.

    Args:
        shape: The weight's [N, K], int64 [2].
        bits: Bits of a code.
        group_size: Inputs of a group; -1 for one group.
        code: The zero point.
    """
    rows, cols = shape.tolist()
    groups = -(-cols // group_size) if group_size > 0 else 1
    return packed(torch.full((groups, rows), code, dtype=torch.uint8), bits)


def group_index(shape: Tensor, group_size: int) -> Tensor:
    """Return the group of each input of a weight [N, K], int32 [K].

    group_size: inputs of a group; -1 for one group.
    """
    cols = int(shape[1])
    return torch.arange(cols, dtype=torch.int32) // (group_size if group_size > 0 else cols)


def awq_words(words: Tensor) -> Tensor:
    """Repack elements int32 [N, K/8] as AWQ's int32 [K, N/8], eight rows a word, interleaved."""
    return awq_zeros(unpacked(words, 4))


def from_awq_words(stored: Tensor) -> Tensor:
    """Undo :func:`awq_words`."""
    return packed(from_awq_zeros(stored), 4)


def awq_zeros(codes_NG: Tensor) -> Tensor:
    """Pack codes uint8 [N, G] as AWQ's int32 [G, N/8]."""
    return packed(_reordered(transposed(codes_NG), _AWQ_ORDER), 4)


def from_awq_zeros(stored: Tensor) -> Tensor:
    """Undo :func:`awq_zeros`."""
    return transposed(_reordered(unpacked(stored, 4), _AWQ_INVERSE))


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    words: Tensor = codes.unflatten(-1, (-1, 8))
    return words[..., list(order)].flatten(-2)


def row_pairs(words: Tensor) -> Tensor:
    """Repack elements int32 [N, K/8] as uint8 [N/2, K]: two's complement, rows paired.

    ModelOpt stores them so.
    """
    # Offset binary and two's complement differ in the top bit alone.
    nibbles = unpacked(words, 4) ^ 8
    return nibbles[0::2] | (nibbles[1::2] << 4)


def from_row_pairs(stored: Tensor) -> Tensor:
    """Undo :func:`row_pairs`."""
    nibbles = torch.stack((stored & 15, stored >> 4), dim=1).flatten(0, 1)
    return packed(nibbles ^ 8, 4)


# One object per meaning, so that equal tensors of a dialect are equal values.
along_rows_8 = partial(along_rows, bits=8)
from_along_rows_8 = partial(from_along_rows, bits=8)
