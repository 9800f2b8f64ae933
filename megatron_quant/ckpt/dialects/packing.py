"""Integer codes in the words of other conventions: along rows, transposed, interleaved.

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
    """Words int32 [..., K * bits / 32] -> codes uint8 [..., K]; ``bits`` is 4 or 8."""
    codes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`unpacked`."""
    codes = codes.contiguous()
    return (pack_nibbles(codes) if bits == 4 else codes).view(torch.int32)


def transposed(stored: Tensor) -> Tensor:
    """[A, B] -> [B, A], contiguous; dims of size 1 have the usual strides, which views ask for."""
    return stored.t().clone(memory_format=torch.contiguous_format)


def along_rows(codes_NG: Tensor, bits: int = 4) -> Tensor:
    """Zeros uint8 [N, G] -> int32 [N * bits / 32, G], a word for rows (compressed-tensors)."""
    return transposed(packed(transposed(codes_NG), bits))


def from_along_rows(words: Tensor, bits: int = 4) -> Tensor:
    """Inverse of :func:`along_rows`."""
    return transposed(unpacked(transposed(words), bits))


def gptq_zeros(codes_NG: Tensor, offset: int, bits: int = 4) -> Tensor:
    """Zeros uint8 [N, G] -> int32 [G, N * bits / 32]; what is stored is ``zero - offset``."""
    return packed((transposed(codes_NG) - offset) & (2**bits - 1), bits)


def from_gptq_zeros(words: Tensor, offset: int, bits: int = 4) -> Tensor:
    """Inverse of :func:`gptq_zeros`."""
    return transposed((unpacked(words, bits) + offset) & (2**bits - 1))


def constant_zeros(shape: Tensor, bits: int, group_size: int, code: int) -> Tensor:
    """Zeros of a symmetric weight [N, K], all ``code``: int32 [ceil(K / group), N * bits / 32].

    Equal in every order of packing. group_size: -1 for one group.
    """
    rows, cols = shape.tolist()
    groups = -(-cols // group_size) if group_size > 0 else 1
    return packed(torch.full((groups, rows), code, dtype=torch.uint8), bits)


def group_index(shape: Tensor, group_size: int) -> Tensor:
    """The group of each input of a weight [N, K], int32 [K]. group_size: -1 for one group."""
    cols = int(shape[1])
    return torch.arange(cols, dtype=torch.int32) // (group_size if group_size > 0 else cols)


def awq_words(words: Tensor) -> Tensor:
    """Elements int32 [N, K/8] -> AWQ's int32 [K, N/8], eight rows a word, interleaved."""
    return awq_zeros(unpacked(words, 4))


def from_awq_words(stored: Tensor) -> Tensor:
    """Inverse of :func:`awq_words`."""
    return packed(from_awq_zeros(stored), 4)


def awq_zeros(codes_NG: Tensor) -> Tensor:
    """Codes uint8 [N, G] -> AWQ's int32 [G, N/8]."""
    return packed(_reordered(transposed(codes_NG), _AWQ_ORDER), 4)


def from_awq_zeros(stored: Tensor) -> Tensor:
    """Inverse of :func:`awq_zeros`."""
    return transposed(_reordered(unpacked(stored, 4), _AWQ_INVERSE))


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    return codes.unflatten(-1, (-1, 8))[..., list(order)].flatten(-2)


def row_pairs(words: Tensor) -> Tensor:
    """Elements int32 [N, K/8] -> uint8 [N/2, K], two's complement, rows paired (ModelOpt)."""
    # Offset binary and two's complement differ in the top bit alone.
    nibbles = unpacked(words, 4) ^ 8
    return nibbles[0::2] | (nibbles[1::2] << 4)


def from_row_pairs(stored: Tensor) -> Tensor:
    """Inverse of :func:`row_pairs`."""
    nibbles = torch.stack((stored & 15, stored >> 4), dim=1).flatten(0, 1)
    return packed(nibbles ^ 8, 4)


# One object per meaning, so that equal tensors of a dialect are equal values.
along_rows_8 = partial(along_rows, bits=8)
from_along_rows_8 = partial(from_along_rows, bits=8)
