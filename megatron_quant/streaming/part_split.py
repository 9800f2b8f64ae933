"""Cut parts to a bounded size, so that a rank's memory does not grow with the model."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from megatron_quant.ckpt.plan import ExportPlan, RankPart

_ELEMENTS = 1 << 25
"""Most elements of a part, if it can be cut between rows."""
_ROWS = 128
"""Rows that a block, or a word of packed elements, may span."""


def bounded_parts(plan: ExportPlan) -> ExportPlan:
    """Cut every large part of ``plan`` into blocks of rows; owners and bytes stay."""
    return replace(plan, parts=tuple(piece for part in plan.parts for piece in _pieces(part)))


def _pieces(part: RankPart) -> Iterator[RankPart]:
    rows = part.region.size[0] if part.region.size else 1
    if part.target.place is not None:  # a stack takes an expert's rows together
        yield part
        return
    step = rows
    while prod(part.region.size) // rows * step > _ELEMENTS and _halves(part, step):
        step //= 2
    if step == rows:
        yield part
        return
    rest = (0,) * (len(part.region.size) - 1)
    for start in range(0, rows, step):
        size = (min(step, rows - start), *part.region.size[1:])
        spans = ((start, start + size[0]),)
        yield replace(
            part, region=replace(part.region, rows=spans, start=(start, *rest), size=size)
        )


def _halves(part: RankPart, step: int) -> bool:
    """Return whether the part can be cut at half of ``step`` rows: blocks stay whole."""
    if part.target.scheme.weights is None:
        return step > 1
    return step % (2 * _ROWS) == 0
