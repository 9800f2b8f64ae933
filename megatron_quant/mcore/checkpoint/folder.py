"""Write a Megatron checkpoint's folder beside its place first; remove only files that it lists.

    NAME.incomplete/megatron_quant_files.json   the files that may appear until it is complete
    NAME.incomplete/checkpoint/                 becomes NAME
    NAME.replaced/                              the old NAME, until the new one has its name
    NAME/megatron_quant_files.json              the files of NAME, and what they are made of

Only files on such a list are removed, and nothing is written where other files lie.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_quant import documents
from megatron_quant.ckpt.storage import explained, read_object, sync_directory, write_file
from megatron_quant.ckpt.write import LOCK, Lock, names_in
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CheckpointError, ExportError

WRITTEN = "megatron_quant_files.json"
_NEW = f"{WRITTEN}.new"
_INSIDE = "checkpoint"
_DOING = "cannot be written"
_ANY = "directory"
_FILES_A_RANK = 2  # tensor files that Megatron writes, one for each thread
_FIRST = "metadata.json"  # without it a folder is no checkpoint


@dataclass(frozen=True, kw_only=True)
class Content:
    """The content of a checkpoint's folder.

    place: the flag that chose the place, or a word for it, for errors' ways out.
    save: collective, writes the tensors into the empty folder that it gets. finish: called on one
    rank, adds the files ``names`` below the folder. made_of: digests of its inputs, which a later
    run compares.
    """

    place: str
    save: Callable[[Path], None]
    finish: Callable[[Path], None]
    names: tuple[str, ...]
    made_of: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A list of the files below its folder, and what they are made of."""

    files: tuple[str, ...]
    made_of: Mapping[str, str] = field(default_factory=dict)


def read_written(folder: Path) -> Written | None:
    """Read the list in ``folder``; None if there is none.

    Raises CheckpointError for a list that this library did not write.
    """
    path = folder / WRITTEN
    if not path.exists():
        return None
    found = read_object(path, documents.INDEX)
    try:
        made_of = {str(key): str(value) for key, value in found["made_of"].items()}
        return Written(files=names_in(found["files"]), made_of=made_of)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} is not as this release writes it") from None


def check_own(folder: Path) -> None:
    """Raise ExportError if ``folder`` has no list of ours, or a file that its list lacks."""
    _own(folder)


def check_free(path: Path) -> None:
    """Raise ExportError if the temporary names beside ``path`` hold files that are not ours."""
    for folder in (_work(path), _replaced(path)):
        if folder.exists() and not _is_bare(folder):
            _own(folder)


def write_folder(path: Path, groups: Groups, content: Content) -> None:
    """Write a checkpoint to ``path``; it may replace one of this library. Collective.

    It lies beside ``path`` until it is complete. Raises ExportError, on every rank alike, if the
    disk refuses, if files that are not ours lie there, or if another run writes there; nothing of
    it is left then.
    """
    first = groups.rank == 0
    lock = together(groups, lambda: _begin(path, groups.size, content) if first else None)
    try:
        content.save(_work(path) / _INSIDE)
        together(groups, lambda: _commit(path, content) if first else None)
    finally:
        if lock is not None:
            _end(path, lock)


def remove_own(folder: Path) -> None:
    """Remove the files that the list in ``folder`` names. Raises ExportError if it has others."""
    with explained(folder, "cannot be removed", _ANY):
        _remove(folder, _own(folder))


def _work(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")


def _replaced(path: Path) -> Path:
    return path.with_name(f"{path.name}.replaced")


def _is_bare(folder: Path) -> bool:
    """Return whether ``folder`` has only what a run leaves that is killed before it has a list."""
    return folder.is_dir() and {p.name for p in folder.iterdir()} <= {LOCK, _NEW}


def _own(folder: Path) -> tuple[str, ...]:
    try:
        written = read_written(folder)
    except CheckpointError as error:
        raise ExportError(f"{error}; move {folder} away or choose another directory") from None
    names = () if written is None else written.files
    known = {*names, _NEW, LOCK} | ({WRITTEN} if written is not None else set())
    other = next((name for name in sorted(_names(folder)) if name not in known), None)
    if other is not None:
        raise ExportError(
            f"{folder / other} is in the way, and this library did not list it as its own; move it "
            "away or choose another directory"
        )
    return names


def _names(folder: Path) -> Iterable[str]:
    """Return the names of all files below ``folder``; links count as files."""
    if not folder.is_dir():
        yield "."
    for at, folders, files in os.walk(folder):
        links = [name for name in folders if Path(at, name).is_symlink()]
        yield from (Path(at, name).relative_to(folder).as_posix() for name in [*files, *links])


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Remove ``names``, and the list itself last. Raises OSError."""
    for name in sorted(names, key=lambda name: (name != _FIRST, name)):
        (folder / name).unlink(missing_ok=True)
    inner = {parent for name in names for parent in Path(name).parents} - {Path()}
    for each in sorted(inner, reverse=True):
        with suppress(OSError):
            (folder / each).rmdir()
    for name in (_NEW, WRITTEN):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _list(folder: Path, written: Written) -> None:
    """Write the list in one step, so that a kill leaves all of it or nothing."""
    write_file(folder / _NEW, (json.dumps(asdict(written)) + "\n").encode(), fsync=True)
    os.replace(folder / _NEW, folder / WRITTEN)


def _expected(ranks: int, content: Content) -> list[str]:
    """List the files that may appear below the checkpoint, Megatron's and torch's included."""
    of_ranks = [f"__{r}_{i}.distcp" for r in range(ranks) for i in range(_FILES_A_RANK)]
    whole = (_FIRST, ".metadata", ".metadata.tmp", "common.pt", *of_ranks)
    return [*whole, *content.names]


def _begin(path: Path, ranks: int, content: Content) -> Lock:
    work = _work(path)
    with explained(work, _DOING, content.place):
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(work, content.place)
        except BaseException:
            with suppress(OSError):
                work.rmdir()
            raise
        try:
            check_free(path)
            _put_back(path)
            if path.exists() and any(path.iterdir()):
                _own(path)
            if not _is_bare(work):  # left by a killed run
                _remove(work, _own(work))
                work.mkdir(exist_ok=True)
            inside = [*_expected(ranks, content), WRITTEN, _NEW]
            _list(work, Written(files=tuple(f"{_INSIDE}/{name}" for name in inside)))
            (work / _INSIDE).mkdir()
        except BaseException:
            _end(path, lock)
            raise
    return lock


def _put_back(path: Path) -> None:
    """Undo, or finish, the replacement that a killed run had begun."""
    replaced = _replaced(path)
    if not replaced.exists():
        return
    if path.exists():
        _remove(replaced, _own(replaced))
    else:
        os.rename(replaced, path)


def _commit(path: Path, content: Content) -> None:
    inside, replaced = _work(path) / _INSIDE, _replaced(path)
    with explained(inside, _DOING, content.place):
        content.finish(inside)
        listed = _own(_work(path))  # refuse if anybody put something there
        files = tuple(name for name in sorted(_names(inside)) if f"{_INSIDE}/{name}" in listed)
        _list(inside, Written(files=files, made_of=content.made_of))
        older = path.exists() and any(path.iterdir())
        if older:
            _own(path)
            os.rename(path, replaced)
        try:
            _give_name(inside, path)
        except BaseException:
            if older:
                os.rename(replaced, path)
            raise
        if older:
            _remove(replaced, _own(replaced))


def _give_name(inside: Path, path: Path) -> None:
    """Rename, and take it back if the new name may not survive a power cut. Raises OSError."""
    os.rename(inside, path)
    try:
        sync_directory(path.parent)
    except BaseException:
        os.rename(path, inside)
        raise


def _end(path: Path, lock: Lock) -> None:
    """Remove what is left at the temporary names, as far as the disk allows."""
    work = _work(path)
    with suppress(OSError, ExportError):
        _remove(work, _own(work))
    lock.release()
    with suppress(OSError):
        work.rmdir()
