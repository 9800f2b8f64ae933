"""Safetensors files as memory: a tensor is a view of pages of its file, read without a copy."""

from mmap import ACCESS_COPY, mmap
from pathlib import Path

import torch

from megatron_quant.ckpt.storage.safetensors_header import TensorEntry

_MAPPED = 1 << 27
"""Bytes that stay mapped after they were read: their pages count as the process's memory."""


class MappedFiles:
    """The files of one directory, each mapped from its first tensor that is read on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._memory: dict[str, mmap] = {}
        self._read = 0

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """A tensor, not to be written; what of it is looked at is read then.

        Raises OSError where the file cannot be read.
        """
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        memory = self._pages(entry)
        data = torch.frombuffer(memory, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
        if entry.offset % entry.dtype.itemsize:  # as some writers leave them
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)

    def _pages(self, entry: TensorEntry) -> mmap:
        """The file, mapped anew after much was read: old pages go when their tensors do."""
        if self._read > _MAPPED:
            self._memory, self._read = {}, 0
        if entry.file not in self._memory:
            with (self._directory / entry.file).open("rb") as stream:
                # Private, and so writable, as torch warns of memory that is not.
                self._memory[entry.file] = mmap(stream.fileno(), 0, access=ACCESS_COPY)
        self._read += entry.nbytes
        return self._memory[entry.file]
