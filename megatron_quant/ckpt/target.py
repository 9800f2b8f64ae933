"""The directory that an export goes to: what it may hold, and what an unfinished export leaves.

An unfinished export is temporary names alone: the files, a journal a rank, and one document that
says of what it is made.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path

from megatron_quant.ckpt.companions import CONFIG, Companions
from megatron_quant.ckpt.dialects.modelopt import HF_QUANT_CONFIG
from megatron_quant.ckpt.disk import allocate, explained, sync_directory, write_at, write_synced
from megatron_quant.ckpt.files import INDEX, OutFile
from megatron_quant.ckpt.manifest import MANIFEST, identity
from megatron_quant.ckpt.plan import ExportPlan
from megatron_quant.ckpt.source import read_json
from megatron_quant.errors import CheckpointError, ExportError

_PARTIALS = ".*.partial"
_UNFINISHED = "megatron_quant_unfinished.json"


class Existing(Enum):
    """What to do with a directory that is not empty."""

    REFUSE = "refuse"
    REPLACE = "replace"
    RESUME = "resume"  # continue the unfinished export in it; start where there is none


def partial(directory: Path, name: str) -> Path:
    """The temporary name of a file, in the directory itself where it belongs in a folder of it."""
    return directory / f".{name.replace('/', '%')}.partial"


def check_target(
    directory: Path, companions: Companions, existing: Existing, plan: ExportPlan
) -> None:
    """Raise ExportError unless an export may go to ``directory``. Changes nothing."""
    with explained(directory, "cannot be used"):
        if not directory.exists() or not any(directory.iterdir()):
            return
        if existing is Existing.REFUSE:
            raise ExportError(_not_empty(directory))
        if any(directory.samefile(path.parent) for path in companions.carried):
            raise ExportError(
                f"{directory} holds the source checkpoint; choose another --export-dir"
            )
        if existing is Existing.RESUME:
            _check_same(directory, _stated(directory), _identity(plan, companions))


def _not_empty(directory: Path) -> str:
    if partial(directory, _UNFINISHED).exists():
        return (
            f"{directory} holds an unfinished export; continue it with --resume, start anew with"
            " --overwrite, or choose another --export-dir"
        )
    return f"{directory} is not empty; pass --overwrite or choose another --export-dir"


def _identity(plan: ExportPlan, companions: Companions) -> dict[str, str]:
    origin = companions.origin
    return {**identity(plan, origin), "statistics": origin.statistics}


def _stated(directory: Path) -> Mapping[str, str]:
    """What the export in ``directory`` is made of; empty where one had hardly begun."""
    complete, unfinished = directory / MANIFEST, partial(directory, _UNFINISHED)
    try:
        if (directory / INDEX).exists() and complete.exists():
            return read_json(complete)
        if not (directory / INDEX).exists() and unfinished.exists():
            return read_json(unfinished)
    except CheckpointError as error:
        raise ExportError(f"{error}; start anew with --overwrite") from None
    if set(directory.iterdir()) <= set(directory.glob(_PARTIALS)):
        return {}
    raise ExportError(
        f"{directory} is not empty and holds no unfinished export that --resume could continue;"
        " pass --overwrite or choose another --export-dir"
    )


_DIFFERENCES = {
    "recipe": "another recipe",
    "source": "another source checkpoint",
    "plan": "other tensors or files (--export-format, --max-shard-size, --dtype)",
    "statistics": "other calibrated scales (the calibration's flags, or another layout)",
}


def _check_same(directory: Path, stated: Mapping[str, str], own: Mapping[str, str]) -> None:
    """What is not known on one side, as statistics before calibration, is not compared."""
    for key, difference in _DIFFERENCES.items():
        if own[key] and stated.get(key) and own[key] != stated[key]:
            raise ExportError(
                f"{directory} holds an export with {difference}; --resume with what it was"
                " started with, start anew with --overwrite, or choose another --export-dir"
            )


def is_complete(directory: Path, existing: Existing) -> bool:
    """On one rank, after :func:`check_target`: whether what is to be continued is finished.

    Then what a kill after the last rename may have left is removed.
    """
    complete = existing is Existing.RESUME and (directory / INDEX).exists()
    if complete:
        discard(directory)
    return complete


def prepare(
    plan: ExportPlan, directory: Path, companions: Companions, existing: Existing
) -> list[Path]:
    """On one rank: empty the way, claim the space of every file, write the headers.

    An older checkpoint's index goes first, so that it never lies beside new files. To continue an
    export its files are kept. Returns the directories that had to be made, the deepest first.
    """
    names = [*companions.names, MANIFEST, INDEX, *(file.name for file in plan.files)]
    assert len(set(names)) == len(names), f"two files of one name: {names}"
    check_target(directory, companions, existing, plan)
    with explained(directory, "cannot be used"):
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        if existing is Existing.RESUME and partial(directory, _UNFINISHED).exists():
            _take_back(directory, plan)
        else:
            _clear(directory)
    try:
        _state(directory, _identity(plan, companions))
        for file in plan.files:
            _create(directory, file)
        sync_directory(directory)
    except BaseException:
        if existing is not Existing.RESUME:
            discard(directory, made)
        raise
    return made


def _clear(directory: Path) -> None:
    (directory / INDEX).unlink(missing_ok=True)
    sync_directory(directory)
    for old in (CONFIG, HF_QUANT_CONFIG, MANIFEST):
        (directory / old).unlink(missing_ok=True)
    for path in (*directory.glob("*.safetensors"), *directory.glob(_PARTIALS)):
        path.unlink()


def _take_back(directory: Path, plan: ExportPlan) -> None:
    """Of an export that was stopped between its renames, make one that was stopped before."""
    for file in plan.files:
        if (directory / file.name).exists():
            (directory / file.name).rename(partial(directory, file.name))


def _state(directory: Path, identity: Mapping[str, str]) -> None:
    """Say what the unfinished export is made of: all of it or nothing, as a kill may come."""
    stage(directory, f"{_UNFINISHED}.new", (json.dumps(identity) + "\n").encode())
    new = partial(directory, f"{_UNFINISHED}.new")
    with explained(new, "cannot be written"):
        new.rename(partial(directory, _UNFINISHED))


def _create(directory: Path, file: OutFile) -> None:
    """What is there of the file already, in the right size or not, is kept."""
    path = partial(directory, file.name)
    with explained(path, f"cannot take {file.size} bytes"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            allocate(fd, file.size)
            write_at(fd, memoryview(file.header), 0)
        finally:
            os.close(fd)


def stage(directory: Path, name: str, content: bytes) -> None:
    """Write a whole file under its temporary name, onto the disk."""
    path = partial(directory, name)
    with explained(path, "cannot be written"):
        write_synced(path, content)


def discard(directory: Path, made: Sequence[Path] = ()) -> None:
    """Remove what an unfinished export left, and nothing else.

    made: directories that it made, the deepest first; one in which other files appeared stays.
    """
    for path in directory.glob(_PARTIALS):
        with suppress(OSError):
            path.unlink()
    for path in made:
        with suppress(OSError):
            path.rmdir()
