"""The directory that an export goes to: what it may hold, and how its files get there.

An unfinished export has only temporary names (see ``unfinished.py``), and one run at a time writes
it (see ``lock.py``).
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from uuid import uuid4

from megatron_quant import __version__, documents
from megatron_quant.ckpt.dialects import HF_QUANT_CONFIG
from megatron_quant.ckpt.plan import CONFIG, Companions, ExportPlan
from megatron_quant.ckpt.storage import (
    INDEX,
    MANIFEST,
    OutFile,
    allocate,
    explained,
    overlap,
    read_object,
    sync_directory,
    write_at,
)
from megatron_quant.ckpt.write import unfinished
from megatron_quant.ckpt.write.lock import LOCK, Lock
from megatron_quant.ckpt.write.manifest import identity
from megatron_quant.ckpt.write.unfinished import Unfinished, discard, partial
from megatron_quant.errors import CheckpointError, ExportError


class Existing(Enum):
    """The treatment of a directory that is not empty."""

    REFUSE = "refuse"
    REPLACE = "replace"
    RESUME = "resume"  # continue the unfinished export in it, or start if there is none


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A directory that only this run writes, until :meth:`release`.

    own: the content of its document. made: directories that had to be made, deepest first.
    """

    directory: Path
    own: Unfinished
    lock: Lock
    made: tuple[Path, ...]
    fsync: bool

    def release(self) -> None:
        """Let other runs in; keep what was written."""
        self.lock.release()

    def discard(self) -> None:
        """Remove what this run wrote; keep a directory in which other files appeared."""
        discard(self.directory, self.own)
        self.release()
        _unmake(self.made)


def _unmake(folders: Iterable[Path]) -> None:
    """Remove folders, the deepest first, but those in which other files appeared."""
    for path in folders:
        with suppress(OSError):
            path.rmdir()


def names_of(plan: ExportPlan, companions: Companions) -> tuple[str, ...]:
    """Return the names of all files of an export, in the order in which they get them."""
    names = (*(file.name for file in plan.files), *companions.names, MANIFEST, INDEX)
    assert len(set(names)) == len(names), f"two files of one name: {names}"
    return names


def check_apart(directory: Path, source: Path, flag: str = "--export-dir") -> None:
    """Raise ExportError if an export would lie in or around the checkpoint it is made of.

    flag: the one that names ``directory``.
    """
    if not overlap(directory, source):
        return
    out, held = directory.resolve(), source.resolve()
    where = "is the source checkpoint"
    if out in held.parents:
        where = f"lies around the source checkpoint {source}"
    elif held in out.parents:
        where = f"lies in the source checkpoint {source}"
    raise ExportError(f"{flag} {directory} {where}; choose another directory")


def check_target(
    directory: Path, companions: Companions, existing: Existing, plan: ExportPlan
) -> None:
    """Raise ExportError unless an export may go to ``directory``. Changes nothing."""
    carried = {path.parent for path in companions.carried}
    with explained(directory, "cannot be used"):
        for source in {companions.root} if companions.root else carried:
            check_apart(directory, source)
        if not directory.exists() or _is_free(directory):
            return
        if existing is Existing.REFUSE:
            raise ExportError(_not_empty(directory))
        if existing is Existing.RESUME:
            _check_same(directory, _stated(directory), _identity(plan, companions))
            if is_finished(directory):
                return
        _check_own(directory, names_of(plan, companions))


def _is_free(directory: Path) -> bool:
    """Return whether the directory is empty but for what a run leaves that is killed at once."""
    left = {directory / LOCK, unfinished.before_document(directory)}
    return set(directory.iterdir()) <= left


def _not_empty(directory: Path) -> str:
    if unfinished.is_begun(directory):
        return (
            f"{directory} holds an unfinished export; continue it with --resume, start anew with"
            " --overwrite, or choose another --export-dir"
        )
    return f"{directory} is not empty; pass --overwrite or choose another --export-dir"


def _identity(plan: ExportPlan, companions: Companions) -> dict[str, str]:
    origin = companions.origin
    made_of = {**identity(plan, origin), "statistics": origin.statistics}
    return {**made_of, "encoder": f"megatron_quant {__version__}"}


def is_finished(directory: Path) -> bool:
    """Return whether there is an index and a manifest of this library: all is there."""
    if not (directory / INDEX).exists() or not (directory / MANIFEST).exists():
        return False
    begun = _begun(directory)
    return begun is None or (begun.naming and not partial(directory, INDEX).exists())


def _stated(directory: Path) -> Mapping[str, str]:
    """Return the inputs that the export in ``directory`` states."""
    try:
        if is_finished(directory):
            return read_object(directory / MANIFEST, documents.INDEX)
        begun = unfinished.read(directory)
    except CheckpointError as error:
        raise ExportError(f"{error}; start anew with --overwrite") from None
    if begun is not None:
        return begun.made_of
    raise ExportError(
        f"{directory} is not empty and holds no unfinished export that --resume could continue;"
        " pass --overwrite or choose another --export-dir"
    )


_DIFFERENCES = {
    "recipe": "another recipe",
    "source": "another source checkpoint",
    "plan": "other tensors or files (--export-format, --max-shard-size, --dtype)",
    "statistics": "other calibrated scales (the calibration's flags, or another layout)",
    "encoder": "encoders of another release",
}


def _check_same(directory: Path, stated: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Compare all that both sides know; before calibration, statistics are not known."""
    for key, difference in _DIFFERENCES.items():
        if own[key] and stated.get(key) and own[key] != stated[key]:
            made_by = f" ({stated[key]}, and this is {own[key]})" if key == "encoder" else ""
            raise ExportError(
                f"{directory} holds an export with {difference}{made_by}; --resume with what it was"
                " started with, start anew with --overwrite, or choose another --export-dir"
            )


def _begun(directory: Path) -> Unfinished | None:
    """Read the document, if it can be read."""
    with suppress(CheckpointError):
        return unfinished.read(directory)
    return None


def _replaced(directory: Path) -> tuple[str, ...]:
    """Return the names of an older export's files, as its manifest lists them.

    Manifests of older releases list no files, so the index does. Raises ExportError if neither can
    be read.
    """
    if not (directory / MANIFEST).exists():
        return ()
    try:
        manifest = read_object(directory / MANIFEST, documents.INDEX)
        listed = manifest.get("files")
        if listed is None and (directory / INDEX).exists():
            weights = read_object(directory / INDEX, documents.INDEX).get("weight_map", {})
            listed = [*set(weights.values()), CONFIG, HF_QUANT_CONFIG]
        return tuple({*unfinished.names_in(listed or ()), MANIFEST, INDEX})
    except (CheckpointError, TypeError, ValueError, AttributeError):
        raise ExportError(
            f"{directory} holds a {MANIFEST} that does not say which files are its own; choose"
            " another --export-dir, or remove what is there"
        ) from None


def _check_own(directory: Path, names: Iterable[str]) -> None:
    """Raise ExportError if a file would be replaced that no export of ours has listed."""
    begun = _begun(directory)
    known = set(_replaced(directory))
    if begun is not None:
        known |= {*begun.replaces, *(begun.names if begun.naming else ())}
    for name in names:
        if name not in known and os.path.lexists(directory / name):
            raise ExportError(
                f"{directory / name} is in the way, and no export of this library wrote it; move "
                "it away or choose another --export-dir"
            )


def leave_finished(plan: ExportPlan, directory: Path, companions: Companions, ranks: int) -> bool:
    """Return whether the export to continue is finished. On one rank, after :func:`check_target`.

    If it is, remove what a kill after the last rename may have left.
    """
    if not is_finished(directory):
        return False
    with explained(directory, "cannot be used"):
        lock = Lock(directory)
    discard(directory, Unfinished(made_of={}, names=names_of(plan, companions), ranks=ranks))
    lock.release()
    return True


def prepare_directory(
    plan: ExportPlan,
    directory: Path,
    companions: Companions,
    existing: Existing,
    ranks: int = 1,
    fsync: bool = True,
) -> Claim:
    """Clear the way, reserve the space of every file, and write the headers. On one rank.

    An older export's index goes first, so that it never lies beside new files. Files of an export
    to continue are kept. ``ranks``: how many may write. Raises ExportError, also if another run
    writes there.
    """
    check_target(directory, companions, existing, plan)
    with explained(directory, "cannot be used"):
        made = tuple(path for path in (directory, *directory.parents) if not path.exists())
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(directory)
        except BaseException:
            _unmake(made)
            raise
    own = Unfinished(
        made_of=_identity(plan, companions),
        names=names_of(plan, companions),
        ranks=ranks,
        run=uuid4().hex,
    )
    claim = Claim(directory=directory, own=own, lock=lock, made=made, fsync=fsync)
    try:
        # Check again: another run may have ended, or begun, before this one had the lock.
        check_target(directory, companions, existing, plan)
    except BaseException:
        claim.release()
        raise
    try:
        with explained(directory, "cannot be used"):
            claim = replace(claim, own=_begin(directory, own, existing, fsync))
        for file in plan.files:
            _create(directory, file)
        with explained(directory, "cannot be used"):
            if fsync:
                sync_directory(directory)
    except BaseException:
        if existing is Existing.RESUME:
            claim.release()
        else:
            claim.discard()
        raise
    return claim


def _begin(directory: Path, own: Unfinished, existing: Existing, fsync: bool) -> Unfinished:
    """Write the document that lists what is to come, and remove older files."""
    begun = _begun(directory)
    if existing is Existing.RESUME and begun is not None:
        unfinished.take_back(directory, begun)
        own = replace(own, ranks=max(own.ranks, begun.ranks), replaces=begun.replaces)
    else:
        discard(directory, own)
        own = replace(own, replaces=_replaced(directory))
    unfinished.write(directory, own, fsync)
    unfinished.remove_replaced(directory, own, fsync)
    return own


def _create(directory: Path, file: OutFile) -> None:
    """Create the file and write its header; keep existing content, whatever its size."""
    path = partial(directory, file.name)
    with explained(path, f"cannot take {file.size} bytes"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            allocate(fd, file.size)
            write_at(fd, memoryview(file.header), 0)
        finally:
            os.close(fd)


def publish(claim: Claim) -> None:
    """Give every file its name, the index last. On one rank, when all is there and verified.

    Raises ExportError; then all files have temporary names again.
    """
    directory, own = claim.directory, replace(claim.own, naming=True, replaces=())
    with explained(directory, "cannot be completed"):
        _check_own(directory, own.names)
        unfinished.write(directory, own, claim.fsync)
        try:
            for name in own.names:
                if name == INDEX and claim.fsync:
                    sync_directory(directory)
                _rename(directory, name, claim.fsync)
            if claim.fsync:
                sync_directory(directory)
        except BaseException:
            unfinished.withdraw(directory, own)
            raise
    discard(directory, own)


def _rename(directory: Path, name: str, fsync: bool) -> None:
    """Give a file its own name, in the folder of the checkpoint that the name may have."""
    final = directory / name
    if final.parent != directory:
        final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(partial(directory, name), final)
    if final.parent != directory and fsync:
        sync_directory(final.parent)
