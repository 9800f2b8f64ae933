"""Write ``--megatron-save-path``; the folder gets its name only once all of it is there."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_quant.ckpt.plan import CONFIG
from megatron_quant.ckpt.storage import explained, read_source, write_file
from megatron_quant.ckpt.write import Existing, beside
from megatron_quant.dist import Groups, gather, together
from megatron_quant.errors import CheckpointError, ExportError
from megatron_quant.mcore.checkpoint import (
    HF_FILES,
    Content,
    check_free,
    check_own,
    is_checkpoint,
    read_written,
    store,
    write_folder,
)
from megatron_quant.mcore.model import LiveModel

_FLAG = "--megatron-save-path"


@dataclass(frozen=True)
class SavePlace:
    """Where a checkpoint goes.

    existing: what to do with one that is there. made_of: digests of its inputs, by input.
    """

    path: Path
    existing: Existing
    made_of: Mapping[str, str] = field(default_factory=dict)


def check_save_path(place: SavePlace) -> None:
    """Raise ExportError unless a checkpoint may go to ``place``. Changes nothing.

    ``place.made_of`` has the digests that are known before the work.
    """
    path = place.path.resolve()
    with explained(path, "cannot be used", _FLAG):
        check_free(path)
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
    if not is_checkpoint(path):
        raise ExportError(f"--megatron-save-path {path} is not empty; choose another directory")
    if place.existing is Existing.REFUSE:
        raise ExportError(
            f"--megatron-save-path {path} holds a checkpoint; choose another directory, or give "
            "--overwrite"
        )
    if place.existing is Existing.RESUME:
        _check_same(place)
    else:
        check_own(path)


def _check_same(place: SavePlace) -> None:
    """Raise ExportError if the finished checkpoint at ``place`` is made of anything else."""
    try:
        written = read_written(place.path)
    except CheckpointError as error:
        raise ExportError(f"{error}; choose another directory") from None
    stated = {} if written is None else written.made_of
    for what, digest in place.made_of.items():
        if stated.get(what) != digest:
            raise ExportError(
                f"--megatron-save-path {place.path} holds a finished checkpoint that was not made "
                f"with this run's {what}, or does not say so; --resume with what it was made of, "
                "or choose another directory"
            )


def save_model(
    model: LiveModel,
    place: SavePlace,
    source: Path | None,
    hf_config: Mapping[str, Any],
    groups: Groups,
) -> None:
    """Save the model to ``place``, with the small files of ``source`` if it is given. Collective.

    A checkpoint of this library is replaced, or with ``Existing.RESUME`` left as it is. Raises
    ExportError, on every rank alike, if the disk refuses, or if ``place`` holds files that this
    library did not write; nothing is left of it then.
    """
    path = place.path.resolve()
    small = together(groups, lambda: _small_files(source))
    if place.existing is Existing.RESUME:
        done = together(groups, lambda: _is_done(place) if groups.rank == 0 else False)
        if gather(done, groups)[0]:
            return

    def finish(folder: Path) -> None:
        files = folder / HF_FILES
        files.mkdir()
        text = json.dumps(dict(hf_config), indent=2) + "\n"
        write_file(files / CONFIG, text.encode(), fsync=True)
        for name, file in small.items():
            carried = read_source(file)
            copy = files / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_file(copy, carried, fsync=True)

    names = (CONFIG, *(name.as_posix() for name in small))
    content = Content(
        place=_FLAG,
        save=lambda folder: store.save(model.chunks, folder, groups),
        finish=finish,
        names=tuple(f"{HF_FILES}/{name}" for name in names),
        made_of=place.made_of,
    )
    write_folder(path, groups, content)


def _small_files(source: Path | None) -> dict[Path, Path]:
    """Find the files to copy, by their names below ``source``."""
    if source is None:
        return {}
    return {file.relative_to(source): file for file in beside(source).carried}


def _is_done(place: SavePlace) -> bool:
    """Return whether an earlier run saved the same. Raises ExportError if it saved another one."""
    if not is_checkpoint(place.path):
        return False
    _check_same(place)
    logging.getLogger(__name__).warning(
        "--megatron-save-path %s is finished: it stays as it is", place.path
    )
    return True
