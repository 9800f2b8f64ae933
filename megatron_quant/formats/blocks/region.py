"""Where a held piece lies in the block grid of its logical tensor.

Blocks (groups, 128 x 128 blocks, whole channels) belong to the logical tensor: its first element
begins the first block, whoever holds the pieces. A matrix that a rank holds consists of *regions*,
one for each logical tensor. Every region has a grid of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.errors import LayoutError
from megatron_quant.formats.spec import Format

Block = tuple[int, ...]
"""Extent of a cell by dim, like :attr:`megatron_quant.formats.record.Field.block`."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """The part of one logical tensor (1-D ones too) in a held matrix.

    Shards are equal: where ``size`` is less than ``whole``, others begin at its multiples. Those of
    a vocabulary are padded to be equal, so the last ones may have fewer rows.

    Attributes:
        rows: Held rows ``(start, stop)``, in the order of the logical tensor, with all columns.
        start: First element of the box of the logical tensor, by dim.
        size: Extent of that box, by dim.
        whole: Shape of the logical tensor.
        part: First row, and number of rows, of the part of the logical tensor that shards divide
            equally; None where that is all of it.
        padded: Rows of a shard with its padding; 0 where none has padding.
    """

    rows: tuple[tuple[int, int], ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    whole: tuple[int, ...]
    part: tuple[int, int] | None = None
    padded: int = 0

    def take(self, held: Tensor) -> Tensor:
        """Take the region out of a held matrix or a stack of them: [..., *size]."""
        if not self.size:
            return held
        dim = held.dim() - len(self.size)
        pieces = [held.narrow(dim, start, stop - start) for start, stop in self.rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def touched(self, block: Block) -> tuple[range, ...]:
        """Return by dim the cells of the logical grid that the region has elements of."""
        spans = zip(self.start, self.size, self._steps(block), strict=True)
        return tuple(range(o // b, -(-(o + n) // b)) for o, n, b in spans)

    def cut(self, block: Block) -> tuple[tuple[int, ...], ...]:
        """Return by dim the cells of the logical grid that an edge between two shards cuts.

        They are equal for all shards of the tensor.

        Raises:
            LayoutError: Where a block lies in two parts of the tensor that are divided apart.
        """
        steps = self._steps(block)
        if self.padded:
            return (_cells(range(self.padded, self.whole[0], self.padded), steps[0]), ())
        if self.part is None:
            return tuple(map(_cut, self.size, self.whole, steps))
        start, rows = self.part
        if any(edge % steps[0] for edge in (start, start + rows) if edge != self.whole[0]):
            raise LayoutError(
                f"--tp cuts rows {start} to {start + rows} of a tensor of {self.whole[0]} rows by "
                f"themselves, in the middle of blocks of {steps[0]} rows: leave --tp at 1, or "
                "choose another format for linear attention"
            )
        cut = _cells(range(start + self.size[0], start + rows, self.size[0]), steps[0])
        return (cut, *map(_cut, self.size[1:], self.whole[1:], steps[1:]))

    def _steps(self, block: Block) -> tuple[int, ...]:
        return tuple(b or n for b, n in zip(block, self.whole, strict=True))


def _cut(size: int, whole: int, step: int) -> tuple[int, ...]:
    assert size == whole or whole % size == 0, (size, whole)
    return _cells(range(size, whole, size), step)


def _cells(edges: range, step: int) -> tuple[int, ...]:
    """Return the cells of ``step`` rows in whose middle an edge lies."""
    return tuple(dict.fromkeys(e // step for e in edges if e % step))


def whole_matrix(rows: int, cols: int) -> Region:
    """Return the region of a matrix that is a logical tensor by itself."""
    return Region(rows=((0, rows),), start=(0, 0), size=(rows, cols), whole=(rows, cols))


def grids(regions: Sequence[Region], fmt: Format) -> tuple[Region, ...]:
    """Return the regions of one matrix that ``fmt`` has to tell apart.

    A format whose blocks have one row needs one region, in the matrix's own order.
    """
    if fmt.stat_block is None or fmt.stat_block[0] == 1:
        rows = sum(region.size[0] for region in regions)
        first = regions[0]
        size, whole = (rows, first.size[1]), (rows, first.whole[1])
        start = (0, first.start[1])
        return (Region(rows=((0, rows),), start=start, size=size, whole=whole),)
    return tuple(regions)


def put_together(parts: Sequence[Tensor], regions: Sequence[Region]) -> Tensor:
    """Undo :meth:`Region.take` for all regions of a matrix: [..., N, K]. Differentiable."""
    if len(parts) == 1:
        return parts[0]
    found: list[tuple[int, Tensor]] = []
    for part, region in zip(parts, regions, strict=True):
        pieces = part.split([stop - start for start, stop in region.rows], dim=-2)
        found += [(start, piece) for (start, _), piece in zip(region.rows, pieces, strict=True)]
    return torch.cat([piece for _, piece in sorted(found, key=lambda item: item[0])], dim=-2)


@dataclass(frozen=True)
class Edge:
    """The blocks of a region that shards cut.

    Attributes:
        dim: 0 where shards cut rows of blocks, 1 for columns.
        count: Number of such blocks that the logical tensor has along ``dim``.
        slots: Those of them that the region touches.
        cells: Where the slots are among all blocks that the region touches.
    """

    dim: int
    count: int
    slots: tuple[int, ...]
    cells: tuple[int, ...]

    def pack(self, values: Tensor, neutral: float) -> Tensor:
        """Pick the cut blocks out of ``values`` [E, N_b, K_b, ...], in one shape on all shards.

        Slots that the region does not touch hold ``neutral``.
        """
        dim, shape = self.dim + 1, list(values.shape)
        shape[dim] = self.count
        own = values.index_select(dim, _index(self.cells, values))
        packed = values.new_full(shape, neutral)
        return packed.index_copy_(dim, _index(self.slots, values), own)

    def unpack(self, merged: Tensor, values: Tensor) -> None:
        """Put the merged values of all shards back into ``values`` of all blocks, in place."""
        own = merged.index_select(self.dim + 1, _index(self.slots, values))
        values.index_copy_(self.dim + 1, _index(self.cells, values), own)


def _index(numbers: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def edge_of(region: Region, fmt: Format) -> Edge | None:
    """Return the blocks of ``fmt`` that shards cut in the region's tensor; None without a cut."""
    block = fmt.stat_block
    if block is None:
        return None
    for dim, (cut, touched) in enumerate(
        zip(region.cut(block), region.touched(block), strict=True)
    ):
        if cut:
            slots = tuple(slot for slot, cell in enumerate(cut) if cell in touched)
            return Edge(dim, len(cut), slots, tuple(cut[slot] - touched.start for slot in slots))
    return None
