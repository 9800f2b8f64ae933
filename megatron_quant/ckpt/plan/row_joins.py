"""Decide which ranks put rows together where shards cut rows, and write them.

Each of the ranks that hold such a tensor encodes its columns. It gets every column of some rows
from all of them. So it writes one run of the file and not one a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from megatron_quant.ckpt.plan.export_plan import ExportPlan, cut_inside
from megatron_quant.ckpt.plan.parts import RankPart
from megatron_quant.ckpt.plan.proof import tiles
from megatron_quant.ckpt.storage import TensorEntry
from megatron_quant.models import Box, Domain

LONG_BYTES = 8 << 10
"""Length from which pieces of rows are written one by one: that is about as quick, see
docs/performance.md, and needs less memory."""
BATCH_BYTES = 16 << 20
"""Approximate encoded bytes on a rank of tensors that are exchanged together."""

Filled = tuple[TensorEntry, Box]
"""A file tensor and a box of it."""


@dataclass(frozen=True)
class Join:
    """A file tensor that ``members`` fill: each has the columns ``boxes`` (None: none of them)."""

    entry: TensorEntry
    boxes: tuple[Box | None, ...]

    def width(self, member: int) -> int:
        """Count the bytes of each row that the member's part has."""
        box = self.boxes[member]
        return prod(box.size[1:]) * self.entry.dtype.itemsize if box else 0

    def rows(self, member: int) -> tuple[int, int]:
        """Return the first row that the member puts together, and the end of its rows."""
        rows, count = self.entry.shape[0], len(self.boxes)
        return rows * member // count, rows * (member + 1) // count

    def box(self, member: int) -> Box | None:
        """Return the box that the member writes; None where it writes nothing."""
        start, stop = self.rows(member)
        inner = self.entry.shape[1:]
        return Box((start, *(0 for _ in inner)), (stop - start, *inner)) if stop > start else None


@dataclass(frozen=True, eq=False)
class Joint:
    """The parts of one tensor, one for each member, and the file tensors that they join."""

    parts: tuple[RankPart, ...]
    joins: tuple[Join, ...]

    @property
    def members(self) -> tuple[int, ...]:
        """Return the ranks that encode, exchange and write."""
        return tuple(part.owner for part in self.parts)

    @property
    def domain(self) -> Domain:
        """Return the domain whose shards they are."""
        return self.parts[0].param.domain

    @property
    def name(self) -> str:
        """Return the name of the Hugging Face tensor."""
        return self.parts[0].target.source.name

    def filled(self, member: int) -> Iterator[Filled]:
        """Yield all boxes that the member writes."""
        joined = {join.entry.name for join in self.joins}
        for piece in self.parts[member].pieces:
            if piece.entry.name not in joined:
                yield piece.entry, piece.box
        for join in self.joins:
            if (box := join.box(member)) is not None:
                yield join.entry, box


def joints(plan: ExportPlan) -> tuple[Joint, ...]:
    """Return the tensors of ``plan`` to join, in the order of the model, equal on all ranks."""
    cut: dict[str, list[RankPart]] = {}
    for part in plan.parts:
        if cut_inside(part.region):
            cut.setdefault(part.target.source.name, []).append(part)
    found = (Joint(tuple(parts), tuple(_joins(parts))) for parts in cut.values())
    return tuple(joint for joint in found if joint.joins)


def _joins(parts: Sequence[RankPart]) -> Iterator[Join]:
    boxes = [{piece.entry.name: piece.box for piece in part.pieces} for part in parts]
    for entry in parts[0].target.entries:
        join = Join(entry, tuple(of_part.get(entry.name) for of_part in boxes))
        widths = [join.width(member) for member in range(len(parts))]
        row = prod(entry.shape[1:]) * entry.dtype.itemsize
        if 0 < max(widths) < min(row, LONG_BYTES):
            _check(join)
            yield join


def _check(join: Join) -> None:
    """Assert that the columns make whole rows, and the written rows the whole tensor."""
    rows = join.entry.shape[0]
    assert all(b is None or (b.start[0], b.size[0]) == (0, rows) for b in join.boxes), join
    members = range(len(join.boxes))
    assert sum(map(join.width, members)) == prod(join.entry.shape[1:]) * join.entry.dtype.itemsize
    written = tuple(box for m in members if (box := join.box(m)))
    assert tiles(join.entry.shape, written), join


def batches(wanted: Sequence[Joint], rank: int) -> tuple[tuple[Joint, ...], ...]:
    """Return those of ``wanted`` that ``rank`` takes part in, grouped into common exchanges.

    All members of a batch have it, and all ranks meet in the order of first tensors. So no rank
    waits for one that waits for it.
    """
    open_of: dict[tuple[int, ...], list[Joint]] = {}
    filled: dict[tuple[int, ...], int] = {}
    found: list[list[Joint]] = []
    for joint in wanted:
        members, size = joint.members, max(part.nbytes for part in joint.parts)
        if rank not in members:
            continue
        if members not in open_of or filled[members] + size > BATCH_BYTES:
            open_of[members], filled[members] = [], 0
            found.append(open_of[members])
        open_of[members].append(joint)
        filled[members] += size
    return tuple(map(tuple, found))
