"""Sources of tensors: what readers of a checkpoint ask of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_quant.models import Box, Copy


@dataclass(frozen=True)
class TensorInfo:
    """The entry of one tensor in a safetensors header; ``file`` is a name in the directory.

    decoded: whether it is decoded from quantized tensors, so that no header says its dtype.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    decoded: bool = False


class TensorSource(Protocol):
    """Named tensors that are read rectangle by rectangle. Iterating yields their names."""

    def __iter__(self) -> Iterator[str]: ...

    @property
    def path(self) -> Path:
        """Return the directory that they come from, for messages."""
        ...

    def info(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and file of what :meth:`read` gives; None if there is no tensor."""
        ...

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of tensor ``name``, in the dtype that :meth:`info` says."""
        ...


class Weights(TensorSource, Protocol):
    """A checkpoint as loaders see it: tensors of an unquantized model, however they are stored.

    What is decoded comes in a float dtype that holds it exactly.
    """

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        ...

    @property
    def unread(self) -> tuple[str, ...]:
        """Return safetensors files in its directory that are not read, as nothing names them."""
        ...

    def dense(self) -> Mapping[str, TensorInfo]:
        """Return, by name, :meth:`info` of every tensor that a model of these weights may have."""
        ...


class Listed(ABC):
    """A checkpoint whose tensors are all known before one is read."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of tensor ``name``, in the dtype that :meth:`info` says."""

    @property
    def is_bare(self) -> bool:
        """Return whether the files name the tensors without the ``model.`` that they have here."""
        return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def unread(self) -> tuple[str, ...]:
        """Return tensors that cannot be read, like :attr:`Weights.unread`."""
        return ()

    def info(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and file of tensor ``name`` as it is read; None if there is none."""
        return self.tensors.get(name)

    def dense(self) -> Mapping[str, TensorInfo]:
        """Return all tensors."""
        return self.tensors


@dataclass(frozen=True)
class Wrapped(ABC):
    """A checkpoint with the names, dtypes and shapes of another, whose values differ.

    Attributes:
        source: The other one.
    """

    source: Weights

    @abstractmethod
    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of tensor ``name``."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    @property
    def path(self) -> Path:
        """Return the directory of the other checkpoint, for messages."""
        return self.source.path

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of its config.json."""
        return self.source.config

    @property
    def unread(self) -> tuple[str, ...]:
        """Return its files that are not read, like :attr:`Weights.unread`."""
        return self.source.unread

    def info(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and file that it says of tensor ``name``; None if there is none."""
        return self.source.info(name)

    def dense(self) -> Mapping[str, TensorInfo]:
        """Return all its tensors."""
        return self.source.dense()


def fill(local: torch.Tensor, copies: Sequence[Copy], checkpoint: TensorSource) -> None:
    """Copy each rectangle of the checkpoint into ``local``, in ``local``'s dtype and device.

    Elements outside all rectangles (vocabulary padding) keep their value.
    """
    with torch.no_grad():
        for copy in copies:
            local[copy.dst.index].copy_(checkpoint.read(copy.source.name, copy.src))
