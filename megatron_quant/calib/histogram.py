"""Clip the inputs of layers at a percentile of all values that calibration showed them.

A histogram covers [0, limit), where the limit is the power of two above the largest value. One that
has to reach further merges two bins into one and keeps its counts. So histograms of different ranks
merge exactly, as if one had seen everything.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_quant.calib.hearing import hear
from megatron_quant.dist import Groups, max_reduce, sum_reduce
from megatron_quant.formats import amax, histogram, percentile_amax
from megatron_quant.layers import QuantLayer
from megatron_quant.recipes import QuantPlan

BINS = 8192
_LEAST = -126
"""Exponent of the limit where nothing but zeros was seen."""


class InputHistogram:
    """Counts of |x| over the inputs of a quantizer: int64 [BINS], up to 2^exponent."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.exponent = _LEAST

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Count the values; a forward pre-hook of the input quantizer."""
        largest = amax(args[0])
        if not torch.isfinite(largest):
            return  # the amax shows it and stops the calibration
        exponent = int(torch.frexp(largest).exponent) if largest > 0 else _LEAST
        self.reach(max(exponent, _LEAST))
        self.counts += histogram(args[0], BINS, _limit(self.exponent, self.counts))

    def reach(self, exponent: int) -> None:
        """Raise the limit to 2^exponent, where it is lower."""
        for _ in range(min(exponent - self.exponent, BINS.bit_length())):
            folded = self.counts.view(-1, 2).sum(-1)
            self.counts = torch.cat([folded, torch.zeros_like(folded)])
        self.exponent = max(self.exponent, exponent)


def _limit(exponent: int, like: Tensor) -> Tensor:
    return torch.tensor(2.0**exponent, device=like.device)


@contextmanager
def histograms(layers: Sequence[QuantLayer]) -> Iterator[dict[str, InputHistogram]]:
    """Count, by layer name, the inputs of static scale while the context lasts."""
    watched = [layer for layer in layers if layer.static_inputs]
    found = {layer.name: InputHistogram(layer.weights()[0].device) for layer in watched}
    hooks = [hear(layer.input_quantizer, found[layer.name]) for layer in watched]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def clip(
    plan: QuantPlan,
    inputs: Mapping[str, float],
    seen: Mapping[str, InputHistogram],
    percent: float,
    groups: Groups,
) -> dict[str, float]:
    """Clip the amaxes ``inputs`` of a plan's slots at their layers' percentiles.

    Two collectives; every rank of ``groups`` calls it.

    Args:
        plan: Plan that has the slots.
        inputs: Amaxes by slot name.
        seen: This rank's histograms by layer name.
        percent: Percentage of values to cover.
        groups: This rank's groups.
    """
    module_of = {slot: plan.by_name[slot].slot.module for slot in inputs}
    bounds = percentiles(list(dict.fromkeys(module_of.values())), seen, percent, groups)
    return {slot: min(value, bounds[module_of[slot]]) for slot, value in inputs.items()}


def percentiles(
    names: Sequence[str], found: Mapping[str, InputHistogram], percent: float, groups: Groups
) -> dict[str, float]:
    """Return the value that ``percent`` of each layer's inputs do not exceed, on every rank.

    Two collectives.

    Args:
        names: All layers of the model with inputs of static scale.
        found: This rank's histograms by layer name.
        percent: Percentage of values to cover.
        groups: This rank's groups.
    """
    reached = torch.tensor([found[n].exponent if n in found else _LEAST for n in names])
    counts = torch.zeros(len(names), BINS, dtype=torch.int64)
    exponents = max_reduce(reached, groups).tolist()
    for row, name, exponent in zip(counts, names, exponents, strict=True):
        if name in found:
            found[name].reach(exponent)
            row.copy_(found[name].counts)
    limits = torch.tensor([2.0**exponent for exponent in exponents])
    values = percentile_amax(sum_reduce(counts, groups), limits, percent)
    return dict(zip(names, values.tolist(), strict=True))
