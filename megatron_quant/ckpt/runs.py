"""Boxes of tensors on disk: their bytes in a file, in the order of the box."""

from collections.abc import Iterable, Iterator
from itertools import product
from math import prod
from operator import mul
from os import preadv

import torch

from megatron_quant.ckpt.digest import LEAF_BYTES, digest_of
from megatron_quant.ckpt.files import TensorEntry
from megatron_quant.models.spec import Box

_READ_BYTES = 64 * LEAF_BYTES
"""Read at a time, to hash what is on disk."""


def whole(entry: TensorEntry) -> Box:
    """The box that is all of a tensor."""
    return Box((0,) * len(entry.shape), entry.shape)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major and on the CPU; no copy where they are so already."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def runs(entry: TensorEntry, box: Box) -> Iterator[tuple[int, int]]:
    """(offset in the file, bytes) of each contiguous run of ``box``, as few as there can be."""
    shape, item = entry.shape, entry.dtype.itemsize
    strides = [prod(shape[dim + 1 :]) * item for dim in range(len(shape))]
    cut = max((dim for dim, n in enumerate(shape) if n != box.size[dim]), default=0)
    start = entry.offset + sum(map(mul, box.start, strides))
    width = prod(box.size[cut:]) * item
    for index in product(*map(range, box.size[:cut])):
        yield start + sum(map(mul, index, strides)), width


def placed(entry: TensorEntry, box: Box, data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The runs of ``box`` with the part of ``data`` that each holds."""
    done = 0
    for offset, width in runs(entry, box):
        yield offset, data[done : done + width]
        done += width


def digest_on_disk(fd: int, entry: TensorEntry, box: Box) -> str:
    """The digest of what the file holds in ``box``; empty where the file ends before."""
    nbytes = prod(box.size) * entry.dtype.itemsize
    try:
        return digest_of(_read(fd, runs(entry, box), nbytes), nbytes)
    except EOFError:
        return ""


def _read(fd: int, where: Iterable[tuple[int, int]], nbytes: int) -> Iterator[memoryview]:
    """The bytes of runs of a file, ``_READ_BYTES`` at a time, each time in the same memory."""
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
