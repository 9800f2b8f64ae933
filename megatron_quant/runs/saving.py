"""Writing ``--megatron-save-path``: a folder of its own name only once all of it is there."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.plan import CONFIG
from megatron_quant.ckpt.storage import explained
from megatron_quant.ckpt.write import Existing
from megatron_quant.ckpt.write import beside as found_beside
from megatron_quant.dist import Groups, together
from megatron_quant.errors import ExportError
from megatron_quant.mcore.checkpoint import HF_FILES, is_checkpoint, store
from megatron_quant.mcore.model import LiveModel

_DOING = "cannot be written"


def check_save_path(path: Path, existing: Existing) -> None:
    """Raise ExportError unless a checkpoint may go to ``path``. Changes nothing."""
    with explained(path, _DOING):
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
    if not is_checkpoint(path):
        raise ExportError(f"--megatron-save-path {path} is not empty; choose another directory")
    if existing is Existing.REFUSE:
        raise ExportError(
            f"--megatron-save-path {path} holds a checkpoint; choose another directory, or "
            "--overwrite"
        )


def save_model(
    model: LiveModel, path: Path, source: Path | None, hf_config: dict[str, Any], groups: Groups
) -> None:
    """Save the model to ``path``, in place of a checkpoint there, with ``source``'s small files.

    source: None where only ``hf_config`` is known.
    Collective. Until it is complete its name ends in ``.incomplete``. Raises ExportError, on every
    rank alike, for what the disk refuses; then nothing is left of it.
    """
    first, temporary = groups.rank == 0, path.with_name(f"{path.name}.incomplete")
    together(groups, lambda: _prepare(temporary) if first else None)
    try:
        store.save(model.chunks, temporary, groups)
        together(groups, lambda: _commit(temporary, path, source, hf_config) if first else None)
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _prepare(temporary: Path) -> None:
    with explained(temporary, _DOING):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)


def _commit(temporary: Path, path: Path, source: Path | None, hf_config: dict[str, Any]) -> None:
    with explained(temporary, _DOING):
        beside = temporary / HF_FILES
        beside.mkdir()
        (beside / CONFIG).write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
        if source is not None:
            _carry(source, beside)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)


def _carry(source: Path, beside: Path) -> None:
    for file in found_beside(source).carried:
        copy = beside / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
