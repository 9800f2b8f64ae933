"""The journal of an unfinished export: a line for each box on disk, with its digest.

Every rank appends to its own file. The lines name tensors and boxes, never ranks, so another layout
can continue with boxes that it cuts the same way. A line says that its bytes were written before
it, not that they are still there: whoever continues hashes them.
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
"""The name of a file tensor, and a box of it."""
_NAME = ".megatron_quant_journal_{}.partial"
_JOURNAL = Limits(512 * MB, 0)
_LINE = Limits(64_000, 100, 4)


def journal_name(rank: int) -> str:
    """Return the name of a rank's journal."""
    return _NAME.format(rank)


def read_journals(paths: Iterable[Path]) -> dict[Key, str]:
    """Read all lines of the journals that exist; skip damaged lines.

    Raises ExportError if one is no regular file, or larger than any that this library writes.
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
    """Return a box and its digest; None if the line is not a journal's."""
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
    """The journal of one rank; ``fd`` is None until the first line."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / journal_name(rank)
        self._fd: int | None = None

    def add(self, written: Iterable[Written], fsync: bool) -> None:
        """Note what is on disk; with ``fsync`` the note reaches the disk too."""
        lines = (json.dumps([e.name, b.start, b.size, it.digest]) for e, b, it in written)
        with explained(self._path, "cannot be written"):
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            # An earlier process may have been killed while it wrote its last line.
            append(self._fd, ("\n" + "\n".join(lines) + "\n").encode())
            if fsync:
                os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
