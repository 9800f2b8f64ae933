"""A training run on disk: model, quantizers and optimizer after a step, for any layout to go on.

    DIR/iter_0000040/                       a ``torch_dist`` checkpoint, and progress.json
    DIR/latest_checkpointed_iteration.txt   "40", as Megatron-LM has it; renamed into place last

A run that is killed at any moment leaves the last save that it finished. The optimizer's state is
in Megatron-Core's ``fully_reshardable`` format, of whole parameters.
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


@dataclass(frozen=True)
class TrainProgress:
    """A finished save.

    path: the checkpoint, which ``prepare`` takes. step: how many steps were done. settings: what
    the run said of itself.
    """

    path: Path
    step: int
    settings: Mapping[str, Any]


def save_run(
    directory: Path, step: int, settings: Mapping[str, Any], model: Any, optimizer: Any
) -> None:
    """Save the run after ``step`` steps; its save before is removed. Collective.

    model: what ``prepare`` quantized, wrapped or not. optimizer: Megatron's, distributed.
    settings: values of JSON. Raises ExportError, on every rank alike, for what the disk refuses and
    where files of others lie at the save's place.
    """
    of, path = quantized(model).model, directory / f"iter_{step:07d}"
    first = of.groups.rank == 0
    content = Content(
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
    """Have the run's directory say that ``path`` is its last save; the one before it goes."""
    before = latest(path.parent)
    with explained(path, "cannot be written"):
        temporary = path.parent / f"{TRACKER}.incomplete"
        write_file(temporary, str(step).encode(), fsync=True)
        os.replace(temporary, path.parent / TRACKER)
    if before not in (path, path.parent) and before.is_dir():
        try:
            remove_own(before)
        except ExportError as error:
            logging.getLogger(__name__).warning("the save before is kept: %s", error)


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
            f"{path} has no {_PROGRESS}: another program saved it: give an empty "
            "directory, or that program"
        )
    found = read_object(path / _PROGRESS)
    step, settings = found.get("step"), found.get("settings")
    if not isinstance(step, int) or not isinstance(settings, dict):
        raise CheckpointError(f"{path / _PROGRESS} says no step and settings: save the run again")
    return TrainProgress(path, step, settings)


def load_progress(saved: TrainProgress, model: Any, optimizer: Any) -> None:
    """Give ``optimizer`` its state of the save from which ``model`` was prepared. Collective.

    Raises CheckpointError, on every rank alike, for what the save lacks.
    """
    of = quantized(model).model
    stored = together(of.groups, lambda: open_torch_dist(saved.path))
    load_optimizer(of.chunks, optimizer, stored, saved.step, of.groups)
