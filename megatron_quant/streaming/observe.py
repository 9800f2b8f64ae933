"""Measure the inputs of weights in a forward of the transformers model."""

from collections.abc import Iterable, Mapping

import torch

from megatron_quant.formats import amax
from megatron_quant.streaming.input_sums import RunningSum
from megatron_quant.weight_inputs import Watched, WeightInputs


class WeightInputAmax(WeightInputs):
    """A mode that keeps the largest magnitude of the inputs of each watched weight.

    Attributes:
        seen: Key -> fp32 []. A weight without inputs is missing, and so is one of a stack that got
            only zeros: some models give these for tokens that go to other experts.
    """

    def __init__(self, watched: Iterable[Watched]) -> None:
        found = tuple(watched)
        super().__init__(found, self._add)
        self.seen: dict[str, torch.Tensor] = {}
        self._alone = {w.keys[0] for w in found if len(w.keys) == 1}

    def _add(self, key: str, x: torch.Tensor) -> None:
        found = amax(x)
        if key in self._alone or found != 0:
            self.seen[key] = torch.maximum(self.seen.get(key, found), found)


class WeightInputSums(WeightInputAmax):
    """A mode that also sums the squares or products of the inputs of some weights.

    Args:
        watched: As of :class:`WeightInputAmax`.
        sums: The sums by key; they grow.
    """

    def __init__(self, watched: Iterable[Watched], sums: Mapping[str, RunningSum]) -> None:
        super().__init__(watched)
        self._sums = sums

    def _add(self, key: str, x: torch.Tensor) -> None:
        super()._add(key, x)
        if key in self._sums:
            self._sums[key].add(x)
