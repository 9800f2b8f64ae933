"""Find the part of each Hugging Face tensor in a shard of a parameter, as one region each."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from megatron_quant.formats import Region
from megatron_quant.models import Copy, Param, Role, Source, copies, local_shape


def regions(param: Param, rank: int, size: int) -> tuple[tuple[Source, Region], ...]:
    """Return the regions that shard ``rank`` of ``size`` holds, in the order of its rows.

    Rectangles that are neighbours in their tensor (the query groups of one rank) are one region. A
    parameter with an order of rows may hold several of one tensor.

    Raises:
        LayoutError: Where ``size`` does not divide the dimension that it cuts.
    """
    if not param.shape:
        return ((param.sources[0], Region(rows=((0, 1),), start=(), size=(), whole=())),)
    found: dict[str, list[Copy]] = {}
    for copy in copies(param, rank, size):
        found.setdefault(copy.source.name, []).append(copy)
    if param.order:
        return tuple(item for pieces in found.values() for item in _ordered(pieces, rank, size))
    each = ((pieces[0].source, _joined(pieces)) for pieces in found.values())
    if param.role not in (Role.EMBEDDING, Role.OUTPUT):
        return tuple(each)
    rows = local_shape(param, rank, size)[0]  # of a vocabulary, the last shards have fewer
    padded = rows if rows * size != param.shape[0] else 0
    return tuple((source, replace(region, padded=padded)) for source, region in each)


def _ordered(pieces: list[Copy], rank: int, size: int) -> Iterator[tuple[Source, Region]]:
    """Yield a region for each run of rows of one tensor, of which every shard has as many."""
    pieces = sorted(pieces, key=lambda copy: copy.src.start[0])
    runs: list[list[Copy]] = [[pieces[0]]]
    for before, piece in pairwise(pieces):
        if before.src.start[0] + before.src.size[0] == piece.src.start[0]:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    for run in runs:
        region, source = _joined(run), run[0].source
        rows = region.size[0]
        part = (region.start[0] - rank * rows, rows * size)
        yield source, region if part == (0, source.shape[0]) else replace(region, part=part)


def _joined(pieces: list[Copy]) -> Region:
    first = pieces[0]
    for a, b in pairwise(pieces):
        assert a.src.start[0] + a.src.size[0] == b.src.start[0], (a, b)
    rows = tuple((p.dst.start[0], p.dst.start[0] + p.dst.size[0]) for p in pieces)
    size = (sum(p.src.size[0] for p in pieces), *first.src.size[1:])
    return Region(rows=_runs(rows), start=first.src.start, size=size, whole=first.source.shape)


def _runs(rows: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Join row ranges that follow one another."""
    runs: list[tuple[int, int]] = []
    for start, stop in rows:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)
