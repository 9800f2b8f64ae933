"""Files from an export plan: every rank writes its own bytes, and the index comes last.

Three phases, between which all ranks meet: :func:`prepare` and :func:`commit` on one rank,
:func:`write_parts` on all. Until the commit every file carries a temporary name, so whatever
stops an export leaves no index behind.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import Enum
from itertools import groupby, product
from math import prod
from operator import mul
from pathlib import Path

import torch

from megatron_quant.ckpt.check import check_plan
from megatron_quant.ckpt.companions import CONFIG, Companions
from megatron_quant.ckpt.dialects.modelopt import HF_QUANT_CONFIG
from megatron_quant.ckpt.disk import allocate, explained, sync_directory, write_at
from megatron_quant.ckpt.files import INDEX, OutFile, TensorEntry
from megatron_quant.ckpt.plan import ExportPlan, Part
from megatron_quant.ckpt.produce import Produced
from megatron_quant.dist import Groups, together
from megatron_quant.errors import ExportError
from megatron_quant.models.spec import Box

Produce = Callable[[Part], Iterable[Produced]]
"""For one part what :func:`megatron_quant.ckpt.produce.produce` yields of it."""
Progress = Callable[[int], None]
"""Called on every rank with the bytes that it has written since the last call."""


class Existing(Enum):
    """What to do with a directory that is not empty."""

    REFUSE = "refuse"
    REPLACE = "replace"


def quiet(nbytes: int) -> None:
    """Report no progress."""


def export(
    plan: ExportPlan,
    groups: Groups,
    produce: Produce,
    directory: Path,
    companions: Companions,
    existing: Existing = Existing.REFUSE,
    progress: Progress = quiet,
) -> None:
    """Write the checkpoint; call it on every rank with the same plan.

    Raises, on every rank, what any rank met: ExportError from the disk, or whatever QuantError
    ``produce`` raises. Then nothing is left in ``directory`` but what was there, less an older
    checkpoint's files under ``Existing.REPLACE``; a directory that was made for it is gone.
    """
    check_plan(plan)
    first = groups.rank == 0
    made = together(groups, lambda: prepare(plan, directory, companions, existing) if first else [])
    try:
        together(groups, lambda: write_parts(plan, groups.rank, produce, directory, progress))
        together(groups, lambda: commit(plan, directory, companions) if first else None)
    except BaseException:
        if first:
            discard(directory, made)
        raise


def check_target(directory: Path, companions: Companions, existing: Existing) -> None:
    """Raise ExportError unless an export may go to ``directory``. Changes nothing."""
    with explained(directory, "cannot be used"):
        if not directory.exists() or not any(directory.iterdir()):
            return
        if existing is Existing.REFUSE:
            raise ExportError(
                f"{directory} is not empty; pass --overwrite or choose another --export-dir"
            )
        if any(directory.samefile(path.parent) for path in companions.carried):
            raise ExportError(
                f"{directory} holds the source checkpoint; choose another --export-dir"
            )


def prepare(
    plan: ExportPlan, directory: Path, companions: Companions, existing: Existing
) -> list[Path]:
    """On one rank: empty the way, claim the space of every file, write the headers.

    An older checkpoint's index goes first, so that it never lies beside new files. Returns the
    directories that had to be made, the deepest first.
    """
    names = [*companions.names, INDEX, *(file.name for file in plan.files)]
    assert len(set(names)) == len(names), f"two files of one name: {names}"
    check_target(directory, companions, existing)
    with explained(directory, "cannot be used"):
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        _clear(directory)
    try:
        for file in plan.files:
            _create(directory, file)
    except BaseException:
        discard(directory, made)
        raise
    return made


def _clear(directory: Path) -> None:
    (directory / INDEX).unlink(missing_ok=True)
    sync_directory(directory)
    for old in (CONFIG, HF_QUANT_CONFIG):
        (directory / old).unlink(missing_ok=True)
    for path in (*directory.glob("*.safetensors"), *directory.glob(".*.partial")):
        path.unlink()


def _partial(directory: Path, name: str) -> Path:
    return directory / f".{name}.partial"


def _create(directory: Path, file: OutFile) -> None:
    path = _partial(directory, file.name)
    with explained(path, f"cannot take {file.size} bytes"), path.open("xb") as stream:
        allocate(stream.fileno(), file.size)
        write_at(stream.fileno(), memoryview(file.header), 0)


def write_parts(
    plan: ExportPlan, rank: int, produce: Produce, directory: Path, progress: Progress = quiet
) -> None:
    """On every rank: encode and write the parts that ``rank`` owns, one at a time."""
    for name, parts in groupby(plan.parts_of(rank), lambda part: part.target.entries[0].file):
        path = _partial(directory, name)
        with explained(path, "cannot be opened"):
            fd = os.open(path, os.O_WRONLY)
        try:
            for part in parts:
                _write_part(fd, path, part, produce)
                progress(part.nbytes)
            with explained(path, "cannot be written"):
                os.fsync(fd)
        finally:
            os.close(fd)


def _write_part(fd: int, path: Path, part: Part, produce: Produce) -> None:
    planned = {piece.entry.name: piece.box for piece in part.pieces}
    for entry, box, tensor in produce(part):
        assert planned.pop(entry.name) == box, f"{entry.name}: {box} is not the plan's"
        assert tensor.dtype == entry.dtype, f"{entry.name}: {tensor.dtype}"
        assert tuple(tensor.shape) == box.size, f"{entry.name}: {tuple(tensor.shape)}"
        with explained(path, "cannot be written"):
            _write_box(fd, entry, box, tensor)
    assert not planned, f"{part.target.source.name} lacks {', '.join(planned)}"


def _write_box(fd: int, entry: TensorEntry, box: Box, tensor: torch.Tensor) -> None:
    """``tensor`` into ``box`` of the entry, in as few writes as the box has contiguous runs."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    shape, item = entry.shape, entry.dtype.itemsize
    strides = [prod(shape[dim + 1 :]) * item for dim in range(len(shape))]
    cut = max((dim for dim, n in enumerate(shape) if n != box.size[dim]), default=0)
    start = entry.offset + sum(map(mul, box.start, strides))
    width = prod(box.size[cut:]) * item
    for run, index in enumerate(product(*map(range, box.size[:cut]))):
        at = start + sum(map(mul, index, strides))
        write_at(fd, data[run * width : (run + 1) * width], at)


def commit(plan: ExportPlan, directory: Path, companions: Companions) -> None:
    """On one rank, when all have written: add the other files and give every file its name.

    Everything is on disk under a temporary name before the first rename. The index is renamed
    last: where it is, the checkpoint is complete.
    """
    with explained(directory, "cannot be completed"):
        for source in companions.carried:
            _stage(directory, source.name, source.read_bytes())
        for name, content in {**companions.documents, INDEX: plan.index}.items():
            _stage(directory, name, (json.dumps(content, indent=2) + "\n").encode())
        for name in [*(file.name for file in plan.files), *companions.names]:
            _partial(directory, name).rename(directory / name)
        sync_directory(directory)
        _partial(directory, INDEX).rename(directory / INDEX)
        sync_directory(directory)


def _stage(directory: Path, name: str, content: bytes) -> None:
    with _partial(directory, name).open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def discard(directory: Path, made: Sequence[Path] = ()) -> None:
    """Remove what an unfinished export left, and nothing else.

    made: directories that it made, the deepest first; one in which other files appeared stays.
    """
    for path in directory.glob(".*.partial"):
        with suppress(OSError):
            path.unlink()
    for path in made:
        with suppress(OSError):
            path.rmdir()
