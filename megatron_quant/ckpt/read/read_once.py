"""Tensors that are read once, however many checks ask for them."""

from collections.abc import Iterator

from torch import Tensor

from megatron_quant.ckpt.read.source import TensorInfo, TensorSource
from megatron_quant.models import Box, whole


class ReadOnce:
    """Keeps every tensor of a source that was read whole until its module is done."""

    def __init__(self, source: TensorSource):
        """Set up; read nothing yet."""
        self.path = source.path
        self._source = source
        self._read: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def info(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and file of tensor ``name``; None if there is none."""
        return self._source.info(name)

    def raw(self, name: str) -> Tensor:
        """Read all of the tensor ``name``, one of those iterated."""
        found = self._read.get(name)
        if found is None:
            info = self.info(name)
            assert info is not None, name
            found = self._read[name] = self._source.read(name, whole(info.shape))
        return found

    def read(self, name: str, box: Box) -> Tensor:
        """Read ``box`` of tensor ``name``, in its stored dtype."""
        info, found = self.info(name), self._read.get(name)
        if info is not None and box.size == info.shape:
            return self.raw(name)
        return self._source.read(name, box) if found is None else found[box.index]
