"""Write a report: JSON for programs, and beside it the page for people."""

from pathlib import Path

from megatron_quant.documents import check_output_file, write_json, write_text
from megatron_quant.report.facts import Facts
from megatron_quant.report.page import page_of

FLAG = "--report"
_PAGES = (".html", ".htm")


def report_files(path: Path) -> tuple[Path, ...]:
    """Return the files that ``--report`` ``path`` writes: of a page, its JSON first."""
    return (path.with_suffix(".json"), path) if path.suffix.lower() in _PAGES else (path,)


def check_report_files(path: Path) -> None:
    """Raise QuantError, before the work, for a file that could not be written after it."""
    for file in report_files(path):
        check_output_file(FLAG, file)


def write_report_files(path: Path, facts: Facts) -> None:
    """Write the facts of a run; a file is there whole, or as it was before.

    Raises:
        QuantError: For what the disk refuses.
    """
    json_file, *pages = report_files(path)
    drawn = page_of(facts) if pages else ""
    write_json(json_file, facts.document())
    for file in pages:
        write_text(file, drawn)
