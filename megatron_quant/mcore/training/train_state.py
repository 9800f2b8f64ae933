"""Save a training run (model, quantizers, optimizer) so that any layout can continue it.

    DIR/iter_0000040/                       a ``torch_dist`` checkpoint, and progress.json
    DIR/latest_checkpointed_iteration.txt   "40", as in Megatron-LM; renamed into place last

A run that is killed at any moment leaves the last save that it finished. The optimizer's state is
in Megatron-Core's ``fully_reshardable`` format, which holds whole parameters.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.storage import explained, read_object, write_file
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CheckpointError, ExportError
from megatron_quant.mcore.checkpoint import (
    TRACKER,
    Content,
    latest,
    open_torch_dist,
    remove_own,
    store,
    write_folder,
)
from megatron_quant.mcore.live import quantized
from megatron_quant.mcore.training.optimizer_state import load_optimizer

_PROGRESS = "progress.json"
_PLACE = "directory for the run"


@dataclass(frozen=True)
class TrainProgress:
    """A finished save.

    path: the checkpoint, for ``prepare``. step: how many steps were done. settings: those that the
    run gave to :func:`save_run`.
    """

    path: Path
    step: int
    settings: Mapping[str, Any]


def save_run(
    directory: Path, step: int, settings: Mapping[str, Any], model: Any, optimizer: Any
) -> None:
    """Save the run after ``step`` steps, and remove its previous save. Collective.

    model: the one that ``prepare`` quantized, wrapped or not. optimizer: Megatron's distributed
    one. settings: JSON values. Raises ExportError, on every rank alike, if the disk refuses, or if
    files that are not ours lie at the save's place.
    """
    of, path = quantized(model).model, directory / f"iter_{step:07d}"
    first = of.groups.rank == 0
    content = Content(
        place=_PLACE,
        save=lambda folder: store.save(of.chunks, folder, of.groups, optimizer),
        finish=lambda folder: _add_progress(folder, step, settings),
        names=(_PROGRESS,),
    )
    write_folder(path, of.groups, content)
    together(of.groups, lambda: _name_latest(path, step) if first else None)


def _add_progress(folder: Path, step: int, settings: Mapping[str, Any]) -> None:
    progress = json.dumps({"step": step, "settings": settings}, indent=2)
    write_file(folder / _PROGRESS, progress.encode(), fsync=True)


def _name_latest(path: Path, step: int) -> None:
    """Name ``path`` as the last save in the run's directory, and remove the previous one."""
    before = latest(path.parent)
    with explained(path, "cannot be written", _PLACE):
        temporary = path.parent / f"{TRACKER}.incomplete"
        write_file(temporary, str(step).encode(), fsync=True)
        os.replace(temporary, path.parent / TRACKER)
    if before not in (path, path.parent) and before.is_dir():
        try:
            remove_own(before)
        except ExportError as error:
            logging.getLogger(__name__).warning("the previous save is kept: %s", error)


def last_save(directory: Path, groups: Groups) -> TrainProgress | None:
    """Return the last save that a run finished in ``directory``; None without one. Collective.

    Raises CheckpointError, on every rank alike, for one that cannot be read.
    """
    return together(groups, lambda: _last_save(directory))


def _last_save(directory: Path) -> TrainProgress | None:
    path = latest(directory)
    if path == directory:
        return None
    if not (path / _PROGRESS).is_file():
        raise CheckpointError(
            f"{path} has no {_PROGRESS}, so another program saved it: give an empty directory, or "
            "continue with that program"
        )
    found = read_object(path / _PROGRESS)
    step, settings = found.get("step"), found.get("settings")
    if not isinstance(step, int) or not isinstance(settings, dict):
        raise CheckpointError(f"{path / _PROGRESS} has no step and settings: save the run again")
    return TrainProgress(path, step, settings)


def load_progress(saved: TrainProgress, model: Any, optimizer: Any) -> None:
    """Fill ``optimizer`` from the save that ``model`` was prepared from. Collective.

    Raises CheckpointError, on every rank alike, if the save lacks a part of it.
    """
    of = quantized(model).model
    stored = together(of.groups, lambda: open_torch_dist(saved.path))
    load_optimizer(of.chunks, optimizer, stored, saved.step, of.groups)
