"""Address boxes of tensors on disk: their bytes in a file, in the order of the box."""

from collections.abc import Iterable, Iterator
from itertools import islice, product
from math import prod
from operator import mul
from os import preadv

import torch

from megatron_quant.ckpt.storage.safetensors_header import TensorEntry
from megatron_quant.ckpt.storage.tree_digest import LEAF_BYTES, Hashed, hashed_in_pieces
from megatron_quant.models import Box
from megatron_quant.native import Leaves

_READ_BYTES = 64 * LEAF_BYTES
"""Bytes that are read at a time to hash a file."""


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, row-major and on the CPU; copy only if they are not."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def runs(entry: TensorEntry, box: Box) -> Iterator[tuple[int, int]]:
    """Yield (offset in the file, bytes) of each contiguous run of ``box``, as few as possible."""
    shape, item = entry.shape, entry.dtype.itemsize
    strides = [prod(shape[dim + 1 :]) * item for dim in range(len(shape))]
    cut = max((dim for dim, n in enumerate(shape) if n != box.size[dim]), default=0)
    start = entry.offset + sum(map(mul, box.start, strides))
    width = prod(box.size[cut:]) * item
    for index in product(*map(range, box.size[:cut])):
        yield start + sum(map(mul, index, strides)), width


def placed(entry: TensorEntry, box: Box, data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the runs of ``box``, each with its part of ``data``."""
    done = 0
    for offset, width in runs(entry, box):
        yield offset, data[done : done + width]
        done += width


def leaves_of(entry: TensorEntry, box: Box, data: memoryview) -> Leaves:
    """Return the bytes of ``box`` as leaves of the tensor's digest, or as their own message.

    They are a message of their own if the box is not made of whole leaves in a row.
    """
    first, ends = _place(entry, box) or (0, True)
    return Leaves(data, first, ends)


def is_of_leaves(entry: TensorEntry, box: Box) -> bool:
    """Return whether :func:`leaves_of` returns leaves of the tensor."""
    return _place(entry, box) is not None


def _place(entry: TensorEntry, box: Box) -> tuple[int, bool] | None:
    """Return the number of the first leaf, and whether the last is the tensor's; None without."""
    found = list(islice(runs(entry, box), 2))
    if len(found) != 1:
        return None
    start, end = found[0][0] - entry.offset, sum(found[0]) - entry.offset
    if start % LEAF_BYTES or (end % LEAF_BYTES and end != entry.nbytes):
        return None
    return start // LEAF_BYTES, end == entry.nbytes


def hashed_on_disk(fd: int, entry: TensorEntry, box: Box) -> Hashed | None:
    """Hash the bytes of ``box`` in the file; None where the file ends before."""
    first, ends = _place(entry, box) or (0, True)
    nbytes = prod(box.size) * entry.dtype.itemsize

    def leaves() -> Iterator[Leaves]:
        done = 0
        for piece in _read(fd, runs(entry, box), nbytes):
            last = done + len(piece) == nbytes
            yield Leaves(piece, first + done // LEAF_BYTES, ends and last)
            done += len(piece)

    try:
        return hashed_in_pieces(leaves())
    except EOFError:
        return None


def _read(fd: int, where: Iterable[tuple[int, int]], nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of runs of a file, ``_READ_BYTES`` at a time, always in the same memory."""
    buffer, filled = memoryview(bytearray(min(nbytes, _READ_BYTES))), 0
    for offset, width in where:
        end = offset + width
        while offset < end:
            count = preadv(fd, [buffer[filled : filled + end - offset]], offset)
            if not count:
                raise EOFError
            offset, filled = offset + count, filled + count
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled or not nbytes:
        yield buffer[:filled]
