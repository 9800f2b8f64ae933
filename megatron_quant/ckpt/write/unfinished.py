"""The files of an unfinished export: temporary names, and one document that lists them.

Only files that a document, an index or the present export names are removed. The document is
written before the first file, removed after the last one, and replaced as a whole. So it says at
every moment which names are the export's.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_quant import documents
from megatron_quant.ckpt.storage import INDEX, explained, read_object, sync_directory, write_file
from megatron_quant.ckpt.write.journal import journal_name
from megatron_quant.errors import CheckpointError, ExportError

DOCUMENT = "megatron_quant_unfinished.json"
_NEW = f"{DOCUMENT}.new"


def partial(directory: Path, name: str) -> Path:
    """Return a file's temporary name; it lies in the directory, even for a file in a folder."""
    return directory / f".{name.replace('/', '%')}.partial"


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """An export in progress.

    made_of: digests of recipe, source, plan and statistics, and the encoders' version. names: all
    of its files, the index last. ranks: how many may have a journal. replaces: files of an older
    checkpoint that are still to be removed. naming: whether files may have their own names
    already. run: a number of this run, by which ranks tell whether they see the same directory.
    """

    made_of: Mapping[str, str]
    names: tuple[str, ...] = ()
    ranks: int = 0
    replaces: tuple[str, ...] = ()
    naming: bool = False
    run: str = ""

    def journals(self, directory: Path) -> list[Path]:
        """Return the journals of all ranks, whether they exist or not."""
        return [directory / journal_name(rank) for rank in range(self.ranks)]


def read(directory: Path) -> Unfinished | None:
    """Read the document of an unfinished export; None if there is none.

    Raises CheckpointError for a document that this library did not write.
    """
    path = partial(directory, DOCUMENT)
    if not path.exists():
        return None
    found = read_object(path, documents.INDEX)
    try:
        return Unfinished(
            made_of={key: _text(value) for key, value in found["made_of"].items()},
            names=names_in(found["names"]),
            ranks=min(int(found["ranks"]), 1 << 20),
            replaces=names_in(found["replaces"]),
            naming=found["naming"] is True,
            run=_text(found["run"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} is not as this release writes it") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def names_in(values: Any) -> tuple[str, ...]:
    """Return file names below the directory; TypeError or ValueError if one leads out of it."""
    names = tuple(map(_text, values))
    for name in names:
        if not name or name.startswith("/") or ".." in Path(name).parts:
            raise ValueError
    return names


def write(directory: Path, unfinished: Unfinished, fsync: bool) -> None:
    """Write the document in one step: a kill leaves the old or the new one. Raises ExportError."""
    stage(directory, _NEW, (json.dumps(asdict(unfinished)) + "\n").encode(), fsync)
    new = partial(directory, _NEW)
    with explained(new, "cannot be written"):
        os.rename(new, partial(directory, DOCUMENT))
        if fsync:
            sync_directory(directory)


SEEN_WITHIN = 60.0
"""Seconds for which an NFS client may believe that a name is missing."""


def wait_for(directory: Path, run: str) -> None:
    """Wait until this host sees the document of ``run``.

    Raises ExportError if it does not within :data:`SEEN_WITHIN`: then it is another directory.
    """
    end, pause = time.monotonic() + SEEN_WITHIN, 0.01
    while True:
        with suppress(OSError, CheckpointError):
            os.listdir(directory)  # makes the client ask its server
            found = read(directory)
            if found is not None and found.run == run:
                return
        if time.monotonic() > end:
            raise ExportError(
                f"{directory} on {socket.gethostname()} is not the directory that rank 0 writes: "
                "choose another --export-dir, one that all ranks see"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def stage(directory: Path, name: str, content: bytes, fsync: bool = True) -> None:
    """Write a whole file under its temporary name; with ``fsync`` make it reach the disk."""
    path = partial(directory, name)
    with explained(path, "cannot be written"):
        write_file(path, content, fsync)


def take_back(directory: Path, unfinished: Unfinished) -> None:
    """Undo a commit that was interrupted between its renames. Raises OSError.

    All files had temporary names when it began: one that has none now has its own.
    """
    if not unfinished.naming:
        return
    for name in reversed(unfinished.names):
        if (directory / name).exists() and not partial(directory, name).exists():
            os.rename(directory / name, partial(directory, name))


def withdraw(directory: Path, unfinished: Unfinished) -> None:
    """Run :func:`take_back` on a disk that has just refused: remove at least the index."""
    with suppress(OSError):
        take_back(directory, unfinished)
    if (directory / INDEX).exists() and not partial(directory, INDEX).exists():
        _remove([directory / INDEX])  # --resume writes it again


def remove_replaced(directory: Path, unfinished: Unfinished, fsync: bool) -> None:
    """Remove what is left of an older checkpoint, its index first. Raises OSError."""
    if unfinished.replaces:
        (directory / INDEX).unlink(missing_ok=True)
        if fsync:
            sync_directory(directory)
        for name in unfinished.replaces:
            (directory / name).unlink(missing_ok=True)


def discard(directory: Path, own: Unfinished | None = None) -> None:
    """Remove the files that an unfinished export lists; a finished one stays.

    own: the present export's, for when no document can be read. If the disk refuses to remove a
    file, the document stays too, so that ``--resume`` and ``--overwrite`` find it.
    """
    found = own
    with suppress(CheckpointError):
        found = read(directory) or own
    if found is None:
        return
    names = {*found.names, *(own.names if own else ())}
    gone = True
    if not (directory / INDEX).exists() or partial(directory, INDEX).exists():
        if found.naming:
            own_names = (n for n in reversed(found.names) if not partial(directory, n).exists())
            gone = _remove(directory / name for name in own_names)
        elif not (directory / INDEX).exists():
            gone = _remove(directory / name for name in found.replaces)
    gone = _remove(partial(directory, name) for name in names) and gone
    gone = _remove({*found.journals(directory), *(own.journals(directory) if own else ())}) and gone
    if gone:
        _remove([partial(directory, _NEW), partial(directory, DOCUMENT)])
    folders = {folder for name in names for folder in Path(name).parents} - {Path()}
    for folder in sorted((directory / folder for folder in folders), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def _remove(paths: Iterable[Path]) -> bool:
    """Remove files as far as the disk allows; return whether all are gone."""
    gone = True
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            gone = False
    return gone


def is_begun(directory: Path) -> bool:
    """Return whether an export has its document there."""
    return partial(directory, DOCUMENT).exists()


def before_document(directory: Path) -> Path:
    """Return the file that a run leaves if it is killed before it has a document."""
    return partial(directory, _NEW)
