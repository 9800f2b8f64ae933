"""A checkpoint as engines will decode its export, for layers that measure inputs behind others."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_quant.ckpt.read import Wrapped
from megatron_quant.models import Box, whole

Values = Callable[[str, torch.Tensor], torch.Tensor]
"""(a tensor's name, its values) -> its values once it is quantized."""


@dataclass(frozen=True)
class QuantizedWeights(Wrapped):
    """Weights whose quantized tensors are read with the values that their codes stand for.

    Attributes:
        values: Called with whole tensors, as they are needed.
    """

    values: Values

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of a tensor as its export is decoded."""
        info = self.info(name)
        assert info is not None, name
        return self.values(name, self.source.read(name, whole(info.shape)))[box.index]
