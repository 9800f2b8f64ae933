"""Where an export must not go."""

from pathlib import Path

from megatron_quant.errors import ExportError


def check_not_source(export_dir: Path, source: Path) -> None:
    """ExportError where ``export_dir`` is the checkpoint that is read."""
    if export_dir.is_dir() and export_dir.samefile(source):
        raise ExportError(
            f"--export-dir {export_dir} is the source checkpoint; choose another directory"
        )
