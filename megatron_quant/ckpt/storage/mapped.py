"""Map safetensors files as memory: a tensor is a view of pages of its file, with no copy.

Reading a page that a file no longer has is a SIGBUS, which ends the process. So sizes are checked
before each tensor. If a file is cut in between, ``library.explain_lost_pages`` explains the end.
"""

import os
from mmap import ACCESS_COPY, mmap
from pathlib import Path

import torch

from megatron_quant.ckpt.storage.safetensors_header import TensorEntry
from megatron_quant.native import library

_MAPPED = 1 << 24
"""Bytes that stay mapped after they were read: their pages count as the process's memory."""


class MappedFiles:
    """The files of one directory, each mapped when its first tensor is read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._memory: dict[str, mmap] = {}
        self._read = 0

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """Return a tensor, not to be written; its pages are read when they are looked at.

        Raises:
            OSError: Where the file cannot be read, or has another size than when it was mapped.
        """
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        memory = self._pages(entry)
        data = torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
        if entry.offset % entry.dtype.itemsize:  # some writers do not align them
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)

    def _pages(self, entry: TensorEntry) -> mmap:
        """Map the file anew after much was read: old pages go when their tensors do."""
        if self._read > _MAPPED:
            self._memory, self._read = {}, 0
        if entry.file not in self._memory:
            library.explain_lost_pages()
            with (self._directory / entry.file).open("rb") as stream:
                _check_size(os.fstat(stream.fileno()).st_size, entry)  # mmap takes no empty file
                # Private, and so writable, as torch warns of memory that is not.
                self._memory[entry.file] = mmap(stream.fileno(), 0, access=ACCESS_COPY)
        memory = self._memory[entry.file]
        _check_size(memory.size(), entry, len(memory))
        self._read += entry.nbytes
        return memory


def _check_size(size: int, entry: TensorEntry, mapped: int | None = None) -> None:
    """Raise OSError where a file of ``size`` bytes lacks some, or had ``mapped`` ones before."""
    if size < entry.offset + entry.nbytes or mapped not in (None, size):
        raise OSError(
            f"the file has {size} bytes, but had another size when it was opened: another program "
            "writes or truncates it; run again when that has ended"
        )
