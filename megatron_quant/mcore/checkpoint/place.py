"""Find the checkpoint in the directory that a training run left."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megatron_quant.documents import Limits, read_bytes, shown
from megatron_quant.errors import CheckpointError

DESCRIPTION, TENSORS = "metadata.json", ".metadata"
"""Megatron's account of a checkpoint, and torch's of its tensors."""
TRACKER = "latest_checkpointed_iteration.txt"
_TRACKED = Limits(64, 0)
_RELEASE = "release"
_ITERATION = re.compile(r"iter_\d{1,18}")
_INNER = ("weights", "model_weights")
"""Folders in which NeMo keeps a checkpoint's tensors."""
_LEGACY = re.compile(r"mp_rank_\d+(_\d+)*")


def is_checkpoint(path: Path) -> bool:
    """Return whether Megatron wrote a distributed checkpoint there to the end."""
    return (path / DESCRIPTION).is_file() and is_described(path)


def is_described(path: Path) -> bool:
    """Return whether torch wrote a distributed checkpoint there to the end."""
    return (path / TENSORS).is_file()


def latest(directory: Path) -> Path:
    """Return the checkpoint that a training run in ``directory`` says is its last.

    ``directory`` itself where no run says anything. Raises CheckpointError where it cannot be read.
    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        return directory
    iteration = read_bytes(tracker, _TRACKED).decode(errors="replace").strip()
    if iteration != _RELEASE and not iteration.isdecimal():
        raise CheckpointError(
            f"{tracker} says {shown(iteration)}, which names no checkpoint: give the checkpoint's "
            "own directory"
        )
    return directory / (_RELEASE if iteration == _RELEASE else f"iter_{int(iteration):07d}")


def checkpoint_in(directory: Path) -> Path:
    """Return the checkpoint of ``directory``; ``directory`` itself where it has none below.

    That is the one which a run's own word names, else ``release``, else the last iteration that is
    complete. NeMo's folders of weights are looked into.

    Raises CheckpointError as :func:`latest`, and for the format ``torch``, whose files are pickles.
    """
    path = _inner(latest(directory))
    if path == directory and not is_described(path):
        path = _inner(_last(directory))
    legacy = None if is_described(path) else next(_below(path, _LEGACY), None)
    if legacy is not None:
        raise CheckpointError(
            f"{path} is a checkpoint of the legacy format torch ({legacy.name}: pickles, which are "
            "not opened): convert it with Megatron-LM's --ckpt-convert-format torch_dist "
            "--ckpt-convert-save DIR, and give DIR"
        )
    return path


def _last(directory: Path) -> Path:
    """Return ``release`` of ``directory``, or its last complete iteration; else itself."""
    if is_described(_inner(directory / _RELEASE)):
        return directory / _RELEASE
    found = ((int(path.name[5:]), path) for path in _below(directory, _ITERATION))
    return max((x for x in found if is_described(_inner(x[1]))), default=(0, directory))[1]


def _below(directory: Path, names: re.Pattern[str]) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in directory.iterdir() if names.fullmatch(path.name))


def _inner(path: Path) -> Path:
    """Return the folder of ``path`` that has its tensors."""
    if is_described(path):
        return path
    return next((path / name for name in _INNER if is_described(path / name)), path)
