"""Merge statistics over ranks: values of the logical slots, whoever holds their pieces.

A statistic is a flat vector with one number a planned slot, in one order on every rank. A rank
leaves the neutral element where it holds nothing. So one all-reduce over the model's ranks merges
tensor, expert, expert-tensor, data and pipeline parallelism at once, whatever the number of layers
and experts. A rank that saw nothing cannot make another one wait.
"""

from collections.abc import Mapping, Sequence

import torch

from megatron_quant.dist import Groups, max_reduce, sum_reduce

Local = Mapping[str, torch.Tensor]
"""Slot name -> this rank's 0-dim value."""

_ABSENT = -1.0  # below every amax, which is never negative


def merge_max(slots: Sequence[str], values: Local, groups: Groups) -> dict[str, float]:
    """Return the largest value of each slot over ranks, in one collective; equal on all of them.

    A slot that no rank has a value for is missing from the result. NaN comes back as infinity, as
    backends differ in the maximum of NaN and a number.

    Args:
        slots: Slot names in one order on all ranks.
        values: This rank's values.
        groups: This rank's groups.
    """
    row = torch.full((len(slots),), _ABSENT, dtype=torch.float32)
    _scatter(row, slots, values)
    row = row.nan_to_num(nan=torch.inf, posinf=torch.inf)
    merged = zip(slots, max_reduce(row, groups).tolist(), strict=True)
    return {slot: value for slot, value in merged if value != _ABSENT}


def merge_sum(slots: Sequence[str], values: Local, groups: Groups) -> dict[str, int]:
    """Sum each slot's counts over ranks, in one collective; 0 where no rank has a value."""
    row = torch.zeros(len(slots), dtype=torch.int64)
    _scatter(row, slots, values)
    return dict(zip(slots, sum_reduce(row, groups).tolist(), strict=True))


def _scatter(row: torch.Tensor, slots: Sequence[str], values: Local) -> None:
    held = [(i, values[slot]) for i, slot in enumerate(slots) if slot in values]
    if held:
        index, local = zip(*held, strict=True)
        row[list(index)] = torch.stack(list(local)).to(row)
