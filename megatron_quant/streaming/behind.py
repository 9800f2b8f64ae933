"""A checkpoint as engines will decode its export, for layers that measure inputs behind others."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.read import TensorInfo, Weights
from megatron_quant.models import Box, whole

Values = Callable[[str, torch.Tensor], torch.Tensor]
"""(a tensor's name, its values) -> its values once it is quantized."""


class QuantizedWeights:
    """Weights whose quantized tensors are read with the values that their codes stand for."""

    def __init__(self, checkpoint: Weights, values: Values) -> None:
        """Wrap ``checkpoint``; ``values`` is called with whole tensors, as they are needed."""
        self._checkpoint, self._values = checkpoint, values

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    @property
    def path(self) -> Path:
        """Return the directory of the checkpoint."""
        return self._checkpoint.path

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return self._checkpoint.config

    @property
    def unread(self) -> tuple[str, ...]:
        """Return the files that are not read."""
        return self._checkpoint.unread

    def dense(self) -> Mapping[str, TensorInfo]:
        """Return all tensors that a model of these weights may have."""
        return self._checkpoint.dense()

    def info(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and file of a tensor; None if there is none."""
        return self._checkpoint.info(name)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of a tensor as its export is decoded."""
        info = self.info(name)
        assert info is not None, name
        return self._values(name, self._checkpoint.read(name, whole(info.shape)))[box.index]
