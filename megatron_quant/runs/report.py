"""Write a run's facts where ``--report`` says: JSON for programs, a page for people."""

from collections.abc import Callable
from pathlib import Path

from megatron_quant.ckpt.storage import overlap
from megatron_quant.dist import Groups, together
from megatron_quant.errors import QuantError
from megatron_quant.report import Facts, check_report_files, report_files, write_report_files


def check_report(path: Path | None, groups: Groups, *folders: str | Path | None) -> None:
    """Refuse now a report that could not be written after the work. Collective.

    folders: those that the run reads or writes, where a report may not lie.
    """

    def check() -> None:
        if path is not None:
            _check_apart(path, folders)
            check_report_files(path)

    together(groups, lambda: check() if groups.rank == 0 else None)


def _check_apart(path: Path, folders: tuple[str | Path | None, ...]) -> None:
    for folder in folders:
        if folder is None or not any(overlap(file, Path(folder)) for file in report_files(path)):
            continue
        raise QuantError(f"--report {path} lies in {folder}; choose a place outside of it")


def write_report(path: Path | None, groups: Groups, facts: Callable[[], Facts]) -> None:
    """Write the facts on the first rank. Collective."""
    if path is not None:
        together(groups, lambda: write_report_files(path, facts()) if groups.rank == 0 else None)
