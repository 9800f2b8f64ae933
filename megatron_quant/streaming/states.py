"""The hidden states of the calibration text between two layers, in a file of this rank's own."""

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_quant.ckpt.storage import (
    DIGEST_BYTES,
    Draft,
    TensorEntry,
    allocate,
    as_bytes,
    explained,
    lay_out,
    write_at,
)

Shape = tuple[int, ...]


class StatesFile:
    """A safetensors file with one tensor a batch, called ``0``, ``1`` and so on.

    Its whole space is claimed before the work, so that a disk that is too small says so then.

    Args:
        path: The file.
        shapes: Shape of each batch's hidden states.
        dtype: Their dtype.
    """

    def __init__(self, path: Path, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        self.path, self.shapes, self.dtype = path, shapes, dtype
        drafts = [
            Draft(str(i), dtype, shape, torch.Size(shape).numel() * dtype.itemsize)
            for i, shape in enumerate(shapes)
        ]
        (self._file,) = lay_out([drafts], _NO_LIMIT)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole file."""
        return self._file.size

    @property
    def entries(self) -> list[TensorEntry]:
        """Return the place of each tensor."""
        return [replace(entry, file=self.path.name) for entry in self._file.entries]

    def write(self, states: Iterator[torch.Tensor]) -> str:
        """Write the hidden states of all batches, one at a time; return their digest.

        Raises:
            ExportError: For what the disk refuses.
        """
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        with explained(self.path, f"cannot take {self.nbytes} bytes"):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            with explained(self.path, f"cannot take {self.nbytes} bytes"):
                allocate(fd, self.nbytes)
                write_at(fd, memoryview(self._file.header), 0)
            for entry, tensor in zip(self._file.entries, states, strict=True):
                assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
                data = as_bytes(tensor)
                digest.update(data)
                with explained(self.path, "cannot be written"):
                    write_at(fd, data, entry.offset)
        finally:
            os.close(fd)
        return digest.hexdigest()

    def read(self) -> Iterator[torch.Tensor]:
        """Yield the hidden states of each batch. Raises ExportError where they cannot be read."""
        with explained(self.path, "cannot be read"), self.path.open("rb") as stream:
            for entry in self._file.entries:
                states = torch.empty(entry.shape, dtype=self.dtype)
                stream.seek(entry.offset)
                if stream.readinto(as_bytes(states)) != entry.nbytes:
                    raise OSError(errno.EIO, "it is truncated")
                yield states

    def is_intact(self, digest: str) -> bool:
        """Return whether the file holds what :meth:`write` gave ``digest`` for."""
        found = hashlib.blake2b(digest_size=DIGEST_BYTES)
        try:
            with self.path.open("rb") as stream:
                if stream.read(len(self._file.header)) != self._file.header:
                    return False
                while data := stream.read(1 << 24):
                    found.update(data)
        except OSError:
            return False
        return found.hexdigest() == digest


_NO_LIMIT = 1 << 62
