"""Find scales that several tensors share: the largest magnitude of each slot, over all ranks."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from math import isfinite

import torch

from megatron_quant.ckpt.plan import RankPart
from megatron_quant.dist import Groups, max_reduce, sum_reduce, together
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import FOUR_OVER_SIX_RANGE, MSE_MULTIPLIERS, amax, choose, errors
from megatron_quant.recipes import QuantPlan, Slot
from megatron_quant.streaming.part_source import PartSource, scaled

Progress = Callable[[int], None]
Sharing = Callable[[Slot], str]
"""Slot -> name of the set of slots that share its scale."""


def shared(slot: Slot) -> str:
    """Name the scale of a slot: a layer's experts share one, other weights have their own."""
    return slot.sharing


def per_expert(slot: Slot) -> str:
    """Name the scale of a slot: every weight of every expert has its own."""
    return slot.fused or slot.name


def slot_amaxes(
    source: PartSource,
    quant: QuantPlan,
    parts: tuple[RankPart, ...],
    groups: Groups,
    progress: Progress,
) -> dict[str, float]:
    """Find the largest magnitude of every slot that needs one; equal on all ranks. One collective.

    Args:
        source: The source checkpoint.
        quant: The resolved recipe.
        parts: Parts that this rank writes. All ranks' parts together are the model.
        groups: This rank's groups.
        progress: Called with the bytes of each part that is done.

    Raises:
        CheckpointError: On every rank, for a weight that has NaN or Inf.
    """
    names = [d.slot.name for d in quant.quantized]
    index = {name: i for i, name in enumerate(names)}
    largest = [-1.0] * len(names)

    def measure() -> None:
        for part in scaled(parts):
            found = amax(source.read(part)).item()
            if not isfinite(found):
                raise CheckpointError(
                    f"{source.checkpoint.path}: {part.target.source.name} has NaN or Inf in "
                    f"{source.dtype}; repair the checkpoint, or choose a wider --dtype"
                )
            at = index[part.param.name]
            largest[at] = max(largest[at], found)
            progress(part.nbytes)

    together(groups, measure)
    merged = zip(names, max_reduce(torch.tensor(largest), groups).tolist(), strict=True)
    return {name: value for name, value in merged if value >= 0}


def shared_amaxes(
    quant: QuantPlan, amaxes: Mapping[str, float], sharing: Sharing
) -> dict[str, torch.Tensor]:
    """Map each slot to the largest amax of all that share its scale, fp32 [].

    Slots of four-over-six get a wider range.
    """
    largest: dict[str, float] = {}
    for name, value in amaxes.items():
        key = sharing(quant.by_name[name].slot)
        largest[key] = max(largest.get(key, 0.0), value)
    found = {}
    for name in amaxes:
        decision = quant.by_name[name]
        found[name] = torch.tensor(largest[sharing(decision.slot)])
        if decision.algorithm == "four_over_six":
            found[name] = found[name] * FOUR_OVER_SIX_RANGE
    return found


def searched_amaxes(
    source: PartSource,
    quant: QuantPlan,
    parts: tuple[RankPart, ...],
    amaxes: dict[str, torch.Tensor],
    sharing: Sharing,
    groups: Groups,
) -> dict[str, torch.Tensor]:
    """Replace ``amaxes`` of searched tensors without blocks (mse) by those with least error."""
    names = [d.slot.name for d in quant.quantized if d.searches_tensor]
    if not names:
        return amaxes
    index = {name: i for i, name in enumerate(names)}
    sums = torch.zeros(len(names), len(MSE_MULTIPLIERS), dtype=torch.int64)

    def measure() -> None:
        for part in scaled(parts):
            name, weights = part.param.name, part.target.scheme.weights
            if name in index and weights is not None:
                w_NK = source.read(part)
                sums[index[name]] += errors(w_NK, weights, None, amaxes[name], MSE_MULTIPLIERS)

    together(groups, measure)
    of_scale: dict[str, torch.Tensor] = defaultdict(lambda: sums.new_zeros(sums.shape[1]))
    for name, row in zip(names, sum_reduce(sums, groups), strict=True):
        of_scale[sharing(quant.by_name[name].slot)] += row
    chosen = {key: choose(row, MSE_MULTIPLIERS) for key, row in of_scale.items()}
    best = {n: amaxes[n] * chosen[sharing(quant.by_name[n].slot)] for n in names}
    return {**amaxes, **best}
