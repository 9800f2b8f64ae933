"""Write the files of an export plan: every rank writes its own bytes, and the index comes last.

All ranks meet between the phases: :func:`prepare_directory` on one rank, :func:`write_parts` on
all, :func:`stage_documents` on one, a check on all, :func:`publish` on one. Until the last phase
every file has a temporary name, so an export that is stopped leaves no index. A journal lists the
bytes that are already there.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_quant.ckpt.plan import Companions, ExportPlan, check_plan, joints
from megatron_quant.ckpt.storage import (
    INDEX,
    MANIFEST,
    TensorDigests,
    TensorEntry,
    explained,
    read_source,
)
from megatron_quant.ckpt.write.directory import (
    Claim,
    Existing,
    check_target,
    leave_finished,
    names_of,
    prepare_directory,
    publish,
)
from megatron_quant.ckpt.write.manifest import digests_on_disk, manifest
from megatron_quant.ckpt.write.pipeline import Progress, WriteOptions
from megatron_quant.ckpt.write.preview import Preview
from megatron_quant.ckpt.write.rank_work import (
    DEFAULTS,
    Produce,
    find_intact,
    nbytes_of,
    quiet,
    work_of,
    write_parts,
)
from megatron_quant.ckpt.write.unfinished import partial, stage, wait_for
from megatron_quant.dist import Groups, gather, together
from megatron_quant.errors import LostRankError

Check = Callable[[Path], object]
"""Called on every rank with the directory of a complete export; raises an error if it is wrong."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where an export goes, and how it gets there.

    companions: the files beside the weights.
    existing: what to do with an export that is there already.
    check: called before any file has its own name, and for an export that was finished already.
    """

    directory: Path
    companions: Companions
    existing: Existing = Existing.REFUSE
    options: WriteOptions = DEFAULTS
    check: Check | None = None


def export(
    plan: ExportPlan,
    groups: Groups,
    produce: Produce,
    to: Destination,
    progress: Progress = quiet,
) -> None:
    """Write the checkpoint; call it on every rank with the same plan.

    Raises on every rank what any rank met: ExportError from the disk, or an error of ``produce``.
    ``to.directory`` then has only what it had before, without an older checkpoint's files under
    ``Existing.REPLACE``; a directory that was made for the export is removed. Under
    ``Existing.RESUME``, and whenever a rank is killed, what was written stays and can be continued.
    """
    check_plan(plan)
    directory, companions, existing = to.directory, to.companions, to.existing
    first = groups.rank == 0

    def complete() -> bool:
        check_target(directory, companions, existing, plan)
        resumes = first and existing is Existing.RESUME
        return resumes and leave_finished(plan, directory, companions, groups.size)

    if gather(together(groups, complete), groups)[0]:
        if to.check is not None:
            to.check(directory)
        return

    def prepared() -> Claim | None:
        if not first:
            return None
        return prepare_directory(
            plan, directory, companions, existing, groups.size, to.options.fsync
        )

    claim = together(groups, prepared)
    try:
        run = gather(claim.own.run if claim else "", groups)[0]
        together(groups, lambda: wait_for(directory, run))
        digests = _write(plan, groups, produce, to, progress)
        together(
            groups, lambda: stage_documents(plan, claim, companions, digests) if claim else None
        )
        if to.check is not None:
            _checked(to.check, names_of(plan, companions), directory, groups)
        together(groups, lambda: publish(claim) if claim else None)
    except Exception as error:
        # Keep the files if a rank was killed or Ctrl-C ended the run: it can be continued.
        if claim and existing is not Existing.RESUME and not isinstance(error, LostRankError):
            claim.discard()
        raise
    finally:
        if claim:
            claim.release()


def _write(
    plan: ExportPlan,
    groups: Groups,
    produce: Produce,
    to: Destination,
    progress: Progress,
) -> dict[str, str]:
    """Write all parts on all ranks; return the digest of every tensor on every rank.

    Bytes are hashed before they are written. A tensor that is cut inside a leaf of its digest is
    read back, because the digest must not depend on the cuts; the ranks share that work.
    """
    rank, directory, options = groups.rank, to.directory, to.options
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
    """Return a rank's share of ``entries``, about equal in bytes and in the order of the files."""
    total, before = sum(entry.nbytes for entry in entries), 0
    for entry in entries:
        if before * size // max(total, 1) == rank:
            yield entry
        before += entry.nbytes


def read_digests(
    entries: Iterable[TensorEntry], directory: Path, options: WriteOptions
) -> dict[str, str]:
    """Compute digests of written tensors, from files that still have temporary names."""
    written = (replace(entry, file=partial(directory, entry.file).name) for entry in entries)
    return digests_on_disk(directory, written, options.io_threads)


def stage_documents(
    plan: ExportPlan, claim: Claim, companions: Companions, digests: Mapping[str, str]
) -> None:
    """Add the other files under temporary names. On one rank, when all have written.

    digests: those of every tensor.
    """
    listed = names_of(plan, companions)
    origin = companions.origin
    documents = {**companions.documents, MANIFEST: manifest(plan, origin, digests, listed)}
    with explained(claim.directory, "cannot be completed"):
        for source in companions.carried:
            name = companions.name_of(source)
            stage(claim.directory, name, read_source(source), claim.fsync)
        for name, content in {**documents, INDEX: plan.index}.items():
            text = (json.dumps(content, indent=2) + "\n").encode()
            stage(claim.directory, name, text, claim.fsync)


def _checked(check: Check, claim_names: Sequence[str], directory: Path, groups: Groups) -> None:
    """Call ``check`` on every rank with the export as it will be."""
    preview = together(groups, lambda: Preview(directory, claim_names))
    try:
        check(preview.path)
    finally:
        preview.close()
