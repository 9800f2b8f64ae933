"""Find the part of each Hugging Face tensor in a shard of a parameter, as one region each."""

from itertools import pairwise

from megatron_quant.formats import Region
from megatron_quant.models import Copy, Param, Source, copies


def regions(param: Param, rank: int, size: int) -> tuple[tuple[Source, Region], ...]:
    """Return the regions that shard ``rank`` of ``size`` holds, in the order of its rows.

    Rectangles that are neighbours in their tensor (the query groups of one rank) are one region.

    Raises:
        LayoutError: Where ``size`` does not divide the dimension that it cuts.
    """
    if not param.shape:
        return ((param.sources[0], Region(((0, 1),), (), (), ())),)
    found: dict[str, list[Copy]] = {}
    for copy in copies(param, rank, size):
        found.setdefault(copy.source.name, []).append(copy)
    return tuple((pieces[0].source, _joined(pieces)) for pieces in found.values())


def _joined(pieces: list[Copy]) -> Region:
    first = pieces[0]
    for a, b in pairwise(pieces):
        assert a.src.start[0] + a.src.size[0] == b.src.start[0], (a, b)
    rows = tuple((p.dst.start[0], p.dst.start[0] + p.dst.size[0]) for p in pieces)
    size = (sum(p.src.size[0] for p in pieces), *first.src.size[1:])
    return Region(_runs(rows), first.src.start, size, first.source.shape)


def _runs(rows: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Join row ranges that follow one another."""
    runs: list[tuple[int, int]] = []
    for start, stop in rows:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)
