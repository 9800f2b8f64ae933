"""Measure the inputs of weights in a forward of the transformers model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from megatron_quant.formats import amax
from megatron_quant.streaming.input_sums import RunningSum
from megatron_quant.weight_inputs import Watched, WeightInputs


@dataclass(frozen=True)
class Seen:
    """The largest inputs of weights, and the tokens of experts, by key.

    Attributes:
        amax: Largest magnitudes, fp32 []; those of experts are 0 also where only tokens of others,
            which some models give as zeros, reached them. A weight without inputs is missing.
        tokens: Tokens of each weight of a stack; those of zeros do not count.
    """

    amax: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


class WeightInputAmax(WeightInputs):
    """A mode that keeps the largest magnitude of the inputs of each watched weight.

    Attributes:
        found: What it has seen.
    """

    def __init__(self, watched: Iterable[Watched]) -> None:
        held = tuple(watched)
        super().__init__(held)
        self.found = Seen()
        self._alone = {w.keys[0] for w in held if len(w.keys) == 1}
        self._deaf = False

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Measure nothing while the context lasts."""
        self._deaf = True
        try:
            yield
        finally:
            self._deaf = False

    def on_input(self, key: str, x: torch.Tensor) -> None:
        """Measure an input [T, K] of the weight of ``key``, unless deaf."""
        if not self._deaf:
            self._add(key, x)

    def _add(self, key: str, x: torch.Tensor) -> None:
        largest, seen = amax(x), self.found.amax
        seen[key] = torch.maximum(seen.get(key, largest), largest)
        if key not in self._alone:
            tokens = self.found.tokens
            tokens[key] = tokens.get(key, 0) + int(x.any(-1).sum())


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
