"""Merging statistics over ranks: values of the logical slots, whoever holds their pieces.

A statistic is a flat vector with one number a planned slot, the same on every rank; a rank leaves
the neutral element where it holds nothing. So one all-reduce over the model's ranks merges tensor,
expert, expert-tensor, data and pipeline parallelism at once, whatever the number of layers and
experts, and a rank that saw nothing cannot make another one wait.
"""

from collections.abc import Mapping, Sequence

import torch

from megatron_quant.dist import Groups, max_reduce, sum_reduce

Values = Mapping[str, torch.Tensor]
"""Slot name -> this rank's 0-dim value."""

_ABSENT = -1.0  # below every amax, which is never negative


def merge_max(slots: Sequence[str], statistics: Sequence[Values], groups: Groups) -> list[Values]:
    """Elementwise maximum over ranks of several amax statistics, in one collective.

    A slot that no rank has a value for is missing from the result. NaN comes back as infinity (the
    maximum of NaN and a number is not defined alike by all backends).
    """
    rows = torch.full((len(statistics), len(slots)), _ABSENT, dtype=torch.float32)
    for row, values in zip(rows, statistics, strict=True):
        _scatter(row, slots, values)
    rows = rows.nan_to_num(nan=torch.inf, posinf=torch.inf)
    merged = max_reduce(rows.flatten(), groups).view_as(rows)
    return [_gathered(row, slots) for row in merged]


def merge_sum(slots: Sequence[str], values: Values, groups: Groups) -> Values:
    """Sum over ranks of one integer statistic; zero where no rank has a value."""
    row = torch.zeros(len(slots), dtype=torch.int64)
    _scatter(row, slots, values)
    return dict(zip(slots, sum_reduce(row, groups).unbind(), strict=True))


def _scatter(row: torch.Tensor, slots: Sequence[str], values: Values) -> None:
    held = [(i, values[slot]) for i, slot in enumerate(slots) if slot in values]
    if held:
        index, local = zip(*held, strict=True)
        row[list(index)] = torch.stack(list(local)).to(row)


def _gathered(row: torch.Tensor, slots: Sequence[str]) -> Values:
    present = (row > _ABSENT).tolist()
    return {s: v for s, v, p in zip(slots, row.unbind(), present, strict=True) if p}
