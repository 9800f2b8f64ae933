"""Boxes of tensors on disk: their bytes in a file, written and hashed in the order of the box."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from operator import mul
from os import preadv

import torch

from megatron_quant.ckpt.disk import write_at
from megatron_quant.ckpt.files import TensorEntry
from megatron_quant.formats import native
from megatron_quant.models.spec import Box

DIGEST_BYTES = 32
_READ_BYTES = 4 << 20  # at a time, to hash what is on disk


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


def write_box(fd: int, entry: TensorEntry, box: Box, data: memoryview) -> None:
    """``data`` into ``box``."""
    done = 0
    for offset, width in runs(entry, box):
        write_at(fd, data[done : done + width], offset)
        done += width


def digests(messages: Sequence[memoryview]) -> list[str]:
    """BLAKE2b-256 of each, in hexadecimal."""
    sizes = [len(message) for message in messages]
    if sum(sizes) >= 2 * max(sizes, default=1):  # enough to do beside the longest
        found = native.blake2b(messages, DIGEST_BYTES)
        if found is not None:
            return [each.hex() for each in found]
    return [hashlib.blake2b(m, digest_size=DIGEST_BYTES).hexdigest() for m in messages]


def digest_on_disk(fd: int, entry: TensorEntry, box: Box) -> str:
    """That digest of what the file holds in ``box``; of a file that ends early what there is."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    buffer = memoryview(bytearray(_READ_BYTES))
    for offset, width in runs(entry, box):
        end = offset + width
        while offset < end:
            count = preadv(fd, [buffer[: end - offset]], offset)
            if not count:
                return ""
            found.update(buffer[:count])
            offset += count
    return found.hexdigest()
