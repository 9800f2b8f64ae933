"""One rank's share of an export: the parts that it encodes, exchanges and writes."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from functools import partial as bound
from math import prod
from pathlib import Path

from megatron_quant.ckpt.dialects import stacked_rows
from megatron_quant.ckpt.plan import ExportPlan, Filled, Joint, RankPart, Slab, batches, with_slabs
from megatron_quant.ckpt.storage import (
    TensorDigests,
    Written,
    as_bytes,
    explained,
    forget,
    hashed_on_disk,
)
from megatron_quant.ckpt.write import unfinished
from megatron_quant.ckpt.write.encode_part import Produced
from megatron_quant.ckpt.write.exchange import Pieces, join_all
from megatron_quant.ckpt.write.journal import Journal, read_journals
from megatron_quant.ckpt.write.pipeline import Encoded, Progress, WriteOptions, WritePipeline
from megatron_quant.ckpt.write.unfinished import partial
from megatron_quant.dist import Shards

Produce = Callable[[RankPart], Iterable[Produced]]
"""Yields the tensors of a part, as :func:`megatron_quant.ckpt.write.encode_part.produce` does."""
DEFAULTS = WriteOptions()
SMALL_BYTES = 128 << 20
"""Encoded bytes that a rank may always hold, however small its parts."""
Item = RankPart | Slab | Joint


def quiet(nbytes: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Work:
    """The work of ``rank``.

    alone: parts that it encodes and writes. joined: tensors whose rows it puts together with other
    ranks, from the part that each encodes. kept: those of them whose own rows are written already.
    """

    rank: int
    alone: tuple[RankPart | Slab, ...]
    joined: tuple[Joint, ...] = ()
    kept: frozenset[Joint] = frozenset()

    @property
    def items(self) -> tuple[Item, ...]:
        """Return the whole work."""
        return (*self.joined, *self.alone)

    def filled(self, item: Item) -> tuple[Filled, ...]:
        """Return the boxes of ``item`` that the rank writes."""
        if not isinstance(item, Joint):
            return tuple((piece.entry, piece.box) for piece in item.pieces)
        return tuple(item.filled(item.members.index(self.rank)))

    def part(self, joint: Joint) -> RankPart:
        """Return the part that the rank encodes of a joined tensor."""
        return joint.parts[joint.members.index(self.rank)]

    def less(self, intact: Iterable[Item], everywhere: Sequence[set[str]]) -> "Work":
        """Return the work without ``intact`` items.

        everywhere: names of intact joined tensors, by rank. A tensor that is intact on some ranks
        only is still exchanged, because the others need it.
        """
        done = frozenset(intact)
        joined = tuple(
            joint
            for joint in self.joined
            if not all(joint.name in everywhere[member] for member in joint.members)
        )
        alone = tuple(part for part in self.alone if part not in done)
        return Work(self.rank, alone, joined, frozenset(joined) & done)


def work_of(plan: ExportPlan, rank: int, joined: Sequence[Joint] = ()) -> Work:
    """Return the work of ``rank`` for ``plan``; several ranks put ``joined`` together."""
    own = tuple(joint for joint in joined if rank in joint.members)
    shared = {part for joint in own for part in joint.parts}
    return Work(rank, with_slabs(p for p in plan.parts_of(rank) if p not in shared), own)


def find_intact(work: Work, directory: Path, options: WriteOptions) -> dict[Item, list[Written]]:
    """Find the journaled boxes of an unfinished export whose bytes are still intact."""
    begun = unfinished.read(directory)
    journal = read_journals(begun.journals(directory)) if begun else {}
    filled = {item: work.filled(item) for item in work.items} if journal else {}
    noted = {i: f for i, f in filled.items() if all((e.name, box) in journal for e, box in f)}
    with ThreadPoolExecutor(options.io_threads) as pool:
        found = zip(noted, pool.map(bound(_on_disk, directory), noted.values()), strict=True)
        return {
            item: written
            for item, written in found
            if written and all(it.digest == journal[e.name, box] for e, box, it in written)
        }


def made(item: RankPart | Slab, produce: Produce) -> Iterable[Produced]:
    """Make the file tensors of a part, or of a stack's part from those of its tensors."""
    if isinstance(item, RankPart):
        return produce(item)
    by_part = [[values for _, _, values in produce(part)] for part in item.parts]
    return [
        (piece.entry, piece.box, stacked_rows(suffix, of_all)[None])
        for piece, suffix, of_all in zip(
            item.pieces, item.place.stack.suffixes, zip(*by_part, strict=True), strict=True
        )
    ]


def nbytes_of(filled: Iterable[Filled]) -> int:
    """Count the bytes of these boxes."""
    return sum(prod(box.size) * entry.dtype.itemsize for entry, box in filled)


def write_parts(
    work: Work,
    produce: Produce,
    directory: Path,
    progress: Progress = quiet,
    options: WriteOptions = DEFAULTS,
    shards: Shards | None = None,
) -> TensorDigests:
    """Encode and write this rank's ``work``; return the digests. Every rank calls it.

    At most twice the bytes of the largest part are encoded at a time, or :data:`SMALL_BYTES`; a
    joined part is held three times meanwhile. Tensors are joined first, so that nobody waits for a
    rank that fails: if one does, the others stop writing.
    """
    parts = [*work.alone, *map(work.part, work.joined)]
    largest = max((part.nbytes for part in parts), default=0)
    max_bytes = max(2 * largest, SMALL_BYTES)
    with WritePipeline(Journal(directory, work.rank), options, max_bytes, progress) as pipeline:
        if not _join(work, produce, directory, pipeline, shards):
            return pipeline.digests
        for part in work.alone:
            pipeline.reserve(part.nbytes)
            pipeline.write(_path(directory, _file(part)), _encoded(part, produce))
    return pipeline.digests


def _file(part: RankPart | Slab) -> str:
    return part.entries[0].file


@lru_cache(maxsize=4096)
def _path(directory: Path, file: str) -> Path:
    return partial(directory, file)


def _encoded(part: RankPart | Slab, produce: Produce) -> list[Encoded]:
    planned = {piece.entry.name: piece.box for piece in part.pieces}
    encoded = []
    for entry, box, tensor in made(part, produce):
        assert planned.pop(entry.name) == box, f"{entry.name}: {box} is not the plan's"
        assert tensor.dtype == entry.dtype, f"{entry.name}: {tensor.dtype}"
        assert tuple(tensor.shape) == box.size, f"{entry.name}: {tuple(tensor.shape)}"
        encoded.append((entry, box, as_bytes(tensor)))
    assert not planned, f"{part.entries[0].name} lacks {', '.join(planned)}"
    return encoded


def _join(
    work: Work, produce: Produce, directory: Path, pipeline: WritePipeline, shards: Shards | None
) -> bool:
    """Write everything that is joined; return whether every rank could."""
    if not work.joined:
        return True
    assert shards is not None, "tensors are joined among the ranks that share them"
    own: list[Encoded] = []

    def encode(batch: tuple[Joint, ...]) -> Pieces:
        pipeline.reserve(3 * sum(work.part(joint).nbytes for joint in batch))
        own[:] = [each for joint in batch for each in _encoded(work.part(joint), produce)]
        return {entry.name: data for entry, _, data in own}

    def write(batch: tuple[Joint, ...], rows: list[Encoded]) -> None:
        for joint in batch:
            if joint not in work.kept:
                wanted = set(work.filled(joint))
                pieces = [each for each in (*own, *rows) if each[:2] in wanted]
                pipeline.write(_path(directory, _file(work.part(joint))), pieces)
        own.clear()

    return join_all(batches(work.joined, work.rank), work.rank, shards, encode, write)


def _on_disk(directory: Path, filled: Sequence[Filled]) -> list[Written]:
    """Hash the bytes of ``filled`` in their file; return nothing if the file ends too early."""
    path = partial(directory, filled[0][0].file)
    with explained(path, "cannot be read back"):
        fd = os.open(path, os.O_RDONLY)
        try:
            written = []
            for entry, box in filled:
                found = hashed_on_disk(fd, entry, box)
                # If a page was read, a network file system sends all of it when a part is written,
                # with old bytes where other hosts write.
                forget(fd, entry.offset, entry.nbytes)
                if found is None:
                    return []
                written.append((entry, box, found))
            return written
        finally:
            os.close(fd)
