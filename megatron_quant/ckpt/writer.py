"""Files from an export plan: every rank writes its own bytes, and the index comes last.

Three phases, between which all ranks meet: :func:`prepare` and :func:`commit` on one rank,
:func:`write_parts` on all. Until the commit every file carries a temporary name, so whatever
stops an export leaves no index behind; a journal says which bytes are there already.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_quant.ckpt.check import check_plan
from megatron_quant.ckpt.companions import Companions
from megatron_quant.ckpt.disk import explained, sync_directory
from megatron_quant.ckpt.files import INDEX, TensorEntry
from megatron_quant.ckpt.join import joints
from megatron_quant.ckpt.manifest import MANIFEST, digests_on_disk, manifest
from megatron_quant.ckpt.parts import (
    DEFAULTS,
    Produce,
    find_intact,
    nbytes_of,
    quiet,
    work_of,
    write_parts,
)
from megatron_quant.ckpt.pipeline import Progress, WriteOptions
from megatron_quant.ckpt.plan import ExportPlan
from megatron_quant.ckpt.target import (
    Existing,
    check_target,
    discard,
    is_complete,
    partial,
    prepare,
    stage,
)
from megatron_quant.ckpt.tensor_digests import TensorDigests
from megatron_quant.dist import Groups, gather, together
from megatron_quant.errors import LostRankError


def export(  # noqa: PLR0913
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

    Raises, on every rank, what any rank met: ExportError from the disk, or whatever ``produce``
    raises. Then nothing is left in ``directory`` but what was there, less an older
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
    except Exception as error:
        # A run whose rank was killed, or that Ctrl-C ended, goes on with what is there.
        if first and existing is not Existing.RESUME and not isinstance(error, LostRankError):
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

    All was hashed before it was written. What is cut through leaves of its digest is read back,
    as the digest must not tell how it was cut; the ranks share that.
    """
    rank = groups.rank
    work = work_of(plan, rank, joints(plan) if groups.shards else ())
    intact = together(groups, lambda: find_intact(work, directory, options))
    everywhere = gather({joint.name for joint in work.joined if joint in intact}, groups)
    progress(sum(nbytes_of(work.filled(item)) for item in intact))
    left = work.less(intact, everywhere)
    digests = together(
        groups,
        lambda: write_parts(left, produce, directory, progress, options, groups.shards),
    )
    for written in intact.values():
        digests.add(written)
    entries, of_all = {entry.name: entry for entry in plan.entries}, TensorDigests()
    for of_rank in gather(digests, groups):
        of_all.merge(of_rank, entries)
    rest = [entry for entry in plan.entries if entry.name not in of_all.complete]
    found = together(
        groups, lambda: read_digests(_share(rest, rank, groups.size), directory, options)
    )
    for read in gather(found, groups):
        of_all.complete |= read
    return of_all.complete


def _share(entries: Sequence[TensorEntry], rank: int, size: int) -> Iterator[TensorEntry]:
    """A rank's share of ``entries``, about equal in bytes and in the order of the files."""
    total, before = sum(entry.nbytes for entry in entries), 0
    for entry in entries:
        if before * size // max(total, 1) == rank:
            yield entry
        before += entry.nbytes


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
            stage(directory, companions.name_of(source), source.read_bytes())
        for name, content in {**documents, INDEX: plan.index}.items():
            stage(directory, name, (json.dumps(content, indent=2) + "\n").encode())
        for name in [*(file.name for file in plan.files), *companions.names, MANIFEST]:
            _rename(directory, name)
        sync_directory(directory)
        partial(directory, INDEX).rename(directory / INDEX)
        sync_directory(directory)
    discard(directory)


def _rename(directory: Path, name: str) -> None:
    """Give a file its own name, in a folder of the checkpoint where that has one."""
    final = directory / name
    if final.parent != directory:
        final.parent.mkdir(parents=True, exist_ok=True)
    partial(directory, name).rename(final)
    if final.parent != directory:
        sync_directory(final.parent)
