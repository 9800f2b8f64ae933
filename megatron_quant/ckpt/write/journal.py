"""The journal of an unfinished export: a line for each box on disk, with its digest.

Every rank appends to a file of its own. The lines speak of tensors and boxes, never of ranks, so
another layout can go on with what is cut alike. A line says that its bytes were written before it,
not that they still are there: who goes on hashes them.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_quant.ckpt.storage import Written, append, explained
from megatron_quant.documents import MB, Limits, check_file, parse_json
from megatron_quant.errors import CheckpointError, ExportError
from megatron_quant.models import Box

Key = tuple[str, Box]
"""A box of the file tensor of this name."""
_NAME = ".megatron_quant_journal_{}.partial"
_JOURNAL = Limits(512 * MB, 0)
_LINE = Limits(64_000, 100, 4)


def journal_name(rank: int) -> str:
    """Name of a rank's journal."""
    return _NAME.format(rank)


def read_journals(paths: Iterable[Path]) -> dict[Key, str]:
    """Read all lines of these journals, where they exist; a damaged line says nothing.

    Raises ExportError where one is no regular file, or larger than any that is written.
    """
    found: dict[Key, str] = {}
    for path in paths:
        if not os.path.lexists(path):
            continue
        check_file(path, _JOURNAL, ExportError)
        with explained(path, "cannot be read"), path.open("rb") as stream:
            while line := stream.readline(_LINE.nbytes):
                noted = _parsed(line)
                if noted is not None:
                    found[noted[0]] = noted[1]
    return found


def _parsed(line: bytes) -> tuple[Key, str] | None:
    """Return a box and its digest; None for a line that is none of a journal."""
    try:
        noted = parse_json(line, "a line", _LINE)
    except CheckpointError:
        return None
    match noted:
        case [str(name), [*start], [*size], str(digest)]:
            if all(type(n) is int for n in (*start, *size)):
                return (name, Box(tuple(start), tuple(size))), digest
    return None


class Journal:
    """The journal of one rank, open for what it writes; ``fd`` is None until it wrote."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / journal_name(rank)
        self._fd: int | None = None

    def add(self, written: Iterable[Written], fsync: bool) -> None:
        """Note what is on disk; ``fsync``: and have the note there too."""
        lines = (json.dumps([e.name, b.start, b.size, it.digest]) for e, b, it in written)
        with explained(self._path, "cannot be written"):
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            # An earlier process may have been killed within its last line.
            append(self._fd, ("\n" + "\n".join(lines) + "\n").encode())
            if fsync:
                os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
