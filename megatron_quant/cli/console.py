"""Show progress, tables and one-line errors to the user. Rank 0 talks."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


def size(nbytes: float) -> str:
    """Format ``nbytes`` for people, in powers of 1000."""
    for unit in _UNITS:
        if nbytes < 1000 or unit == _UNITS[-1]:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    raise AssertionError


class ConsolePhases:
    """Shows a progress bar for every phase that has steps."""

    def __init__(self, out: Console) -> None:
        self.out = out

    def bar(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a phase of ``total`` steps; yield a function to call with steps done."""
        return self._progress(name, total, (MofNCompleteColumn(),))

    def transfer(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a phase that moves ``nbytes`` bytes; yield a function to call with bytes moved."""
        return self._progress(name, nbytes, (DownloadColumn(), TransferSpeedColumn()))

    def time(self, name: str) -> AbstractContextManager[None]:
        """Show nothing of a phase without steps."""
        return nullcontext()

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
        with progress:
            task: TaskID = progress.add_task(escape(name), total=total)
            yield lambda steps: progress.advance(task, steps)
