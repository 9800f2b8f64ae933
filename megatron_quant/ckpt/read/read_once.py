"""Tensors that are read once, however many checks ask for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_quant.ckpt.read.directory import TensorInfo
from megatron_quant.models import Box, whole


class Files(Protocol):
    """The tensors of a checkpoint as they are stored."""

    @property
    def path(self) -> Path:
        """Return its directory."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return all tensors, by name."""
        ...

    def read(self, name: str, box: Box) -> Tensor:
        """Read ``box`` of tensor ``name``, in its stored dtype."""
        ...


class ReadOnce:
    """Keeps every tensor of ``files`` that was read whole until its module is done."""

    def __init__(self, files: Files):
        """Set up; read nothing yet."""
        self.path, self.tensors = files.path, files.tensors
        self._files = files
        self._read: dict[str, Tensor] = {}

    def raw(self, name: str) -> Tensor:
        """Read all of the tensor ``name``, one of ``tensors``."""
        found = self._read.get(name)
        if found is None:
            found = self._read[name] = self._files.read(name, whole(self.tensors[name].shape))
        return found

    def read(self, name: str, box: Box) -> Tensor:
        """Read ``box`` of tensor ``name``, in its stored dtype."""
        if box.size == self.tensors[name].shape:
            return self.raw(name)
        found = self._read.get(name)
        return self._files.read(name, box) if found is None else found[box.index]
