"""Files from an export plan: every rank writes its own bytes, and the index comes last.

Three phases, between which all ranks meet: :func:`prepare` and :func:`commit` on one rank,
:func:`write_parts` on all. Until the commit every file carries a temporary name, so whatever
stops an export leaves no index behind; a journal says which bytes are there already.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial as bound
from pathlib import Path
from typing import TypeVar

from megatron_quant.ckpt.check import check_plan
from megatron_quant.ckpt.companions import Companions
from megatron_quant.ckpt.disk import explained, forget, sync_directory
from megatron_quant.ckpt.files import INDEX, TensorEntry
from megatron_quant.ckpt.journal import Digests, Journal, read_journals
from megatron_quant.ckpt.manifest import MANIFEST, digests_on_disk, manifest
from megatron_quant.ckpt.pipeline import Encoded, Pipeline, Progress, WriteOptions
from megatron_quant.ckpt.plan import ExportPlan, Part
from megatron_quant.ckpt.produce import Produced
from megatron_quant.ckpt.runs import as_bytes, digest_on_disk
from megatron_quant.ckpt.target import (
    Existing,
    check_target,
    discard,
    is_complete,
    partial,
    prepare,
    stage,
)
from megatron_quant.dist import Groups, gather, together
from megatron_quant.errors import QuantError

Produce = Callable[[Part], Iterable[Produced]]
"""For one part what :func:`megatron_quant.ckpt.produce.produce` yields of it."""
K = TypeVar("K")
DEFAULTS = WriteOptions()
SMALL_BYTES = 128 << 20
"""What a rank may always hold encoded, however small its parts."""


def quiet(nbytes: int) -> None:
    """Report no progress."""


def export(
    plan: ExportPlan,
    groups: Groups,
    produce: Produce,
    directory: Path,
    companions: Companions,
    existing: Existing = Existing.REFUSE,
    progress: Progress = quiet,
    options: WriteOptions = DEFAULTS,
) -> None:
    """Write the checkpoint; call it on every rank with the same plan.

    Raises, on every rank, what any rank met: ExportError from the disk, or whatever QuantError
    ``produce`` raises. Then nothing is left in ``directory`` but what was there, less an older
    checkpoint's files under ``Existing.REPLACE``; a directory that was made for it is gone. Under
    ``Existing.RESUME``, and whenever a rank is killed, what was written stays and can be continued.
    """
    check_plan(plan)
    first = groups.rank == 0

    def complete() -> bool:
        check_target(directory, companions, existing, plan)
        return is_complete(directory, existing)

    if gather(together(groups, lambda: first and complete()), groups)[0]:
        return
    made = together(groups, lambda: prepare(plan, directory, companions, existing) if first else [])
    try:
        digests = _write(plan, groups, produce, directory, progress, options)
        together(groups, lambda: commit(plan, directory, companions, digests) if first else None)
    except QuantError:
        if first and existing is not Existing.RESUME:
            discard(directory, made)
        raise


def _write(
    plan: ExportPlan,
    groups: Groups,
    produce: Produce,
    directory: Path,
    progress: Progress,
    options: WriteOptions,
) -> dict[str, str]:
    """All parts, by all ranks; the digest of every tensor, on every rank.

    What one part fills was hashed before it was written. A tensor of several parts is read back
    and hashed whole, as the digest must not tell how it was cut; the ranks share that.
    """
    rank = groups.rank
    boxes = together(groups, lambda: write_parts(plan, rank, produce, directory, progress, options))
    digests = _merged(gather(_of_whole_tensors(plan, boxes), groups))
    rest = [entry for entry in plan.entries if entry.name not in digests]
    found = together(
        groups, lambda: read_digests(_share(rest, rank, groups.size), directory, options)
    )
    return digests | _merged(gather(found, groups))


def _of_whole_tensors(plan: ExportPlan, boxes: Digests) -> dict[str, str]:
    shapes = {entry.name: entry.shape for entry in plan.entries}
    return {name: found for (name, box), found in boxes.items() if box.size == shapes[name]}


def _share(entries: Sequence[TensorEntry], rank: int, size: int) -> Iterator[TensorEntry]:
    """A rank's share of ``entries``, about equal in bytes and in the order of the files."""
    total, before = sum(entry.nbytes for entry in entries), 0
    for entry in entries:
        if before * size // max(total, 1) == rank:
            yield entry
        before += entry.nbytes


def _merged(found: Iterable[Mapping[K, str]]) -> dict[K, str]:
    return {key: digest for some in found for key, digest in some.items()}


def write_parts(
    plan: ExportPlan,
    rank: int,
    produce: Produce,
    directory: Path,
    progress: Progress = quiet,
    options: WriteOptions = DEFAULTS,
) -> Digests:
    """On every rank: encode and write the parts that ``rank`` owns, but for those that are intact.

    At most two of the largest part are encoded at a time, or several of :data:`SMALL_BYTES`
    together. Returns the digest of every box.
    """
    parts = plan.parts_of(rank)
    largest = max((part.nbytes for part in parts), default=0)
    max_bytes = max(2 * largest, SMALL_BYTES)
    intact = _intact(parts, directory, options)
    with Pipeline(Journal(directory, rank), options, max_bytes, progress) as pipeline:
        for part in parts:
            if part in intact:
                progress(part.nbytes)
                continue
            pipeline.reserve(part.nbytes)
            path = partial(directory, part.target.entries[0].file)
            pipeline.write(path, _encoded(part, produce))
    return _merged([pipeline.digests, *intact.values()])


def _encoded(part: Part, produce: Produce) -> list[Encoded]:
    planned = {piece.entry.name: piece.box for piece in part.pieces}
    encoded = []
    for entry, box, tensor in produce(part):
        assert planned.pop(entry.name) == box, f"{entry.name}: {box} is not the plan's"
        assert tensor.dtype == entry.dtype, f"{entry.name}: {tensor.dtype}"
        assert tuple(tensor.shape) == box.size, f"{entry.name}: {tuple(tensor.shape)}"
        encoded.append((entry, box, as_bytes(tensor)))
    assert not planned, f"{part.target.source.name} lacks {', '.join(planned)}"
    return encoded


def _intact(parts: Sequence[Part], directory: Path, options: WriteOptions) -> dict[Part, Digests]:
    """Those that an unfinished export has journaled, and whose bytes are still as it wrote them."""
    journal = read_journals(directory)
    noted = [p for p in parts if all((x.entry.name, x.box) in journal for x in p.pieces)]
    with ThreadPoolExecutor(options.io_threads) as pool:
        found = zip(noted, pool.map(bound(_on_disk, directory), noted), strict=True)
        return {part: has for part, has in found if has.items() <= journal.items()}


def _on_disk(directory: Path, part: Part) -> Digests:
    path = partial(directory, part.target.entries[0].file)
    with explained(path, "cannot be read back"):
        fd = os.open(path, os.O_RDONLY)
        try:
            found: Digests = {}
            for piece in part.pieces:
                found[piece.entry.name, piece.box] = digest_on_disk(fd, piece.entry, piece.box)
                # A network file system would send a page that was read whole when a part of it is
                # written, and with it old bytes of what other hosts write there.
                forget(fd, piece.entry.offset, piece.entry.nbytes)
            return found
        finally:
            os.close(fd)


def read_digests(
    entries: Iterable[TensorEntry], directory: Path, options: WriteOptions
) -> dict[str, str]:
    """Digests of tensors that are written, from files that still have their temporary names."""
    written = (replace(entry, file=partial(directory, entry.file).name) for entry in entries)
    return digests_on_disk(directory, written, options.io_threads)


def commit(
    plan: ExportPlan, directory: Path, companions: Companions, digests: Mapping[str, str]
) -> None:
    """On one rank, when all have written: add the other files and give every file its name.

    digests: of every tensor. Everything is on disk under a temporary name before the first rename.
    The index is renamed last: where it is, the checkpoint is complete.
    """
    documents = {**companions.documents, MANIFEST: manifest(plan, companions.origin, digests)}
    with explained(directory, "cannot be completed"):
        for source in companions.carried:
            stage(directory, source.name, source.read_bytes())
        for name, content in {**documents, INDEX: plan.index}.items():
            stage(directory, name, (json.dumps(content, indent=2) + "\n").encode())
        for name in [*(file.name for file in plan.files), *companions.names, MANIFEST]:
            partial(directory, name).rename(directory / name)
        sync_directory(directory)
        partial(directory, INDEX).rename(directory / INDEX)
        sync_directory(directory)
    discard(directory)
