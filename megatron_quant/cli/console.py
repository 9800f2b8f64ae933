"""Show progress, tables and one-line errors to the user. Rank 0 talks."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich import markup
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_quant.documents import printable
from megatron_quant.errors import QuantError

_FILE_WIDTH = 160  # columns when the output is not a terminal: wide enough to cut no name
_UNITS = ("B", "KB", "MB", "GB", "TB")


def rank() -> int:
    """Return the rank that ``torchrun`` gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def console() -> Console:
    """Return a console on standard output; on ranks other than 0 it prints nothing."""
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return Console(quiet=rank() != 0, width=width)


def escape(text: str) -> str:
    """Escape markup in ``text``, and characters that move the cursor."""
    return markup.escape(printable(text))


def check_output_file(flag: str, path: Path | None) -> None:
    """Raise QuantError, before the work starts, if the file that ``flag`` names is not writable."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        reason = "is a directory" if path.is_dir() else "is in a directory that does not exist"
        raise QuantError(f"{flag} {path} {reason}; choose another file")


def size(nbytes: float) -> str:
    """Format ``nbytes`` for people, in powers of 1000."""
    for unit in _UNITS:
        if nbytes < 1000 or unit == _UNITS[-1]:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    raise AssertionError


class ConsolePhases:
    """Shows progress bars and measures the time of every phase."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}

    def bar(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a phase of ``total`` steps; yield a function to call with steps done."""
        return self._progress(name, total, (MofNCompleteColumn(),))

    def transfer(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a phase that moves ``nbytes`` bytes; yield a function to call with bytes moved."""
        return self._progress(name, nbytes, (DownloadColumn(), TransferSpeedColumn()))

    @contextmanager
    def _progress(
        self, name: str, total: int, columns: Sequence[ProgressColumn]
    ) -> Iterator[Callable[[int], None]]:
        progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.out,
            disable=rank() != 0 or not self.out.is_terminal,
        )
        with self.time(name), progress:
            task: TaskID = progress.add_task(escape(name), total=total)
            yield lambda steps: progress.advance(task, steps)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a phase without showing a bar."""
        start = time.perf_counter()
        self.seconds[name] = 0.0  # so that phases are listed in the order in which they began
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start
