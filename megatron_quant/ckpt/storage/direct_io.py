"""Fill a file in place; bypass the system's cache if its bytes must reach the disk.

The cache would copy them into memory that nobody reads again, drop data that others read, and get
them to the disk no sooner.
"""

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from mmap import PAGESIZE, mmap
from pathlib import Path

import numpy as np

from megatron_quant.ckpt.storage.disk import write_at

Run = tuple[int, memoryview]
"""Bytes, and where in the file they belong."""
_STAGE = 1 << 22
"""Bytes that are written at a time: a multiple of every block that is taken past the cache."""
_WORTH = 1 << 18
"""Bytes in a row that are worth a write past the cache."""
_LEAST, _MOST = 4096, _WORTH
_AT_EMPTY_PATH, _STATX_DIOALIGN = 0x1000, 0x2000
_MEMORY, _OFFSET = 38, 39  # 32-bit words of struct statx: stx_dio_mem_align, stx_dio_offset_align


class StagingBuffer:
    """Aligned memory of one thread, in which blocks are put together."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap(-1, _STAGE))
        self.array = np.frombuffer(self.memory, np.uint8)


class OutputFile:
    """A file that has its final size, open for several threads at a time."""

    def __init__(self, path: Path, direct: bool) -> None:
        """Open the file; bypass the cache where ``direct`` and the file system can.

        Raises:
            OSError: Where it cannot be opened.
        """
        self.path = path
        self._fd = os.open(path, os.O_WRONLY)
        self._block = block_of(self._fd)
        self._direct = _open_direct(path) if direct and self._block else None
        self._bypass = self._direct is not None

    def write(self, runs: Iterable[Run], stage: StagingBuffer) -> None:
        """Write ``runs``, of which none overlap.

        Raises:
            OSError: Where the disk takes no more.
        """
        for group in _adjacent(runs):
            start = end = group[0][0]
            if self._bypass:
                stop, block = group[-1][0] + len(group[-1][1]), self._block
                start, end = -(-start // block) * block, stop // block * block
                if end - start < _WORTH:
                    start = end = group[0][0]
            self._write_blocks(start, self._edges(group, start, end), stage)

    def _edges(self, group: list[Run], start: int, end: int) -> Iterator[memoryview]:
        """Write the bytes outside of ``start`` to ``end``, and yield those inside, in order."""
        for offset, data in group:
            first = min(max(start - offset, 0), len(data))
            last = max(min(end - offset, len(data)), first)
            write_at(self._fd, data[:first], offset)
            write_at(self._fd, data[last:], offset + last)
            yield data[first:last]

    def _write_blocks(
        self, offset: int, pieces: Iterable[memoryview], stage: StagingBuffer
    ) -> None:
        """Write the pieces one after the other from ``offset`` on, whole blocks together."""
        filled, size = 0, len(stage.memory)
        for piece in pieces:
            while piece:
                some = piece[: size - filled]
                stage.array[filled : filled + len(some)] = np.frombuffer(some, np.uint8)
                filled, piece = filled + len(some), piece[len(some) :]
                if filled == size:
                    self._write_stage(stage.memory, offset)
                    offset, filled = offset + size, 0
        self._write_stage(stage.memory[:filled], offset)

    def _write_stage(self, blocks: memoryview, offset: int) -> None:
        try:
            write_at(self._direct if self._bypass and self._direct else self._fd, blocks, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._bypass:
                raise
            self._bypass = False  # some file systems open files for it and then refuse to write
            write_at(self._fd, blocks, offset)

    def sync(self) -> None:
        """Return once all written bytes are on the disk.

        Raises:
            OSError: Where the disk reports an error.
        """
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)


def block_of(fd: int) -> int:
    """Return the multiple that a write past the cache needs as its offset, length and address.

    As the file system says (Linux from 6.1 on), but at least a page, which some hosts have larger
    than 4096. 0 where nothing can bypass it, or blocks are beyond what is worth it.
    """
    found = (ctypes.c_uint32 * 64)()  # struct statx
    call = getattr(ctypes.CDLL(None), "statx", None)
    said = call is not None and not call(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found)
    block = max(_LEAST, PAGESIZE)
    if said and found[0] & _STATX_DIOALIGN:
        memory, offset = found[_MEMORY], found[_OFFSET]
        if not offset:
            return 0
        block = max(block, memory, offset)
    return block if block <= _MOST else 0


def _adjacent(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Yield runs that follow one another, together."""
    group: list[Run] = []
    end = 0
    for offset, data in runs:
        if group and offset != end:
            yield group
            group = []
        group.append((offset, data))
        end = offset + len(data)
    if group:
        yield group


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):  # this system, or this file system, has no O_DIRECT
        return None
