"""Put a run's facts where ``--report`` and ``--log-to`` say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_quant.ckpt.storage import overlap
from megatron_quant.dist import Groups, together
from megatron_quant.errors import QuantError
from megatron_quant.report import (
    Facts,
    check_report_files,
    check_tracker,
    log_facts,
    report_files,
    tracker_of,
    write_report_files,
)


@dataclass(frozen=True)
class Reporting:
    """The places for a run's facts: a file, and a tracker of experiments; None for neither."""

    report: Path | None = None
    log_to: str | None = None


def reporting(report: str | Path | None, log_to: str | None) -> Reporting:
    """Return the places that arguments name."""
    return Reporting(None if report is None else Path(report), log_to)


def check_report(where: Reporting, groups: Groups, *folders: str | Path | None) -> None:
    """Refuse now a report that could not be written after the work. Collective.

    folders: those that the run reads or writes, where a report may not lie.
    """

    def check() -> None:
        if where.report is not None:
            _check_apart(where.report, folders)
            check_report_files(where.report)
        if where.log_to is not None:
            check_tracker(tracker_of(where.log_to))

    together(groups, lambda: check() if groups.rank == 0 else None)


def _check_apart(path: Path, folders: tuple[str | Path | None, ...]) -> None:
    for folder in folders:
        if folder is None or not any(overlap(file, Path(folder)) for file in report_files(path)):
            continue
        raise QuantError(f"--report {path} lies in {folder}; choose a place outside of it")


def write_report(where: Reporting, groups: Groups, facts: Callable[[], Facts]) -> None:
    """Write and log the facts, on the first rank. Collective."""

    def write() -> None:
        found = facts()
        if where.report is not None:
            write_report_files(where.report, found)
        if where.log_to is not None:
            log_facts(tracker_of(where.log_to), found)

    if where != Reporting():
        together(groups, lambda: write() if groups.rank == 0 else None)
