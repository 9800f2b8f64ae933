"""Read a Hugging Face checkpoint slice by slice: a rank reads only what it holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_quant import documents
from megatron_quant.ckpt.read.published import published_names
from megatron_quant.ckpt.read.source import Listed, TensorInfo
from megatron_quant.ckpt.storage import (
    INDEX,
    WEIGHTS,
    MappedFiles,
    TensorEntry,
    UnknownDtype,
    entries_of,
    read_config,
    read_header,
    read_object,
)
from megatron_quant.documents import check_regular
from megatron_quant.errors import CheckpointError
from megatron_quant.models import Box, check_counts, is_draft

_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Listed):
    """An open checkpoint directory: its config, and where each tensor lies.

    config: content of config.json. tensors, entries: by name. files: those in the directory.
    unread: its safetensors files that hold none of these tensors. is_bare: whether the files name
    the tensors without the ``model.`` that they have here.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    entries: dict[str, TensorEntry] = field(repr=False)
    files: MappedFiles = field(repr=False)
    unread: tuple[str, ...] = ()
    is_bare: bool = False

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read only ``box`` of tensor ``name``, in its stored dtype."""
        entry = self.entries[name]
        try:
            tensor = self.files.tensor(entry)
        except OSError as e:
            raise CheckpointError(f"{self.path / entry.file}: {name} cannot be read: {e}") from e
        part = tensor if box.size == entry.shape else tensor[box.index]
        assert tuple(part.shape) == box.size, (name, box, tuple(part.shape))
        return part


def open_directory(path: Path) -> Checkpoint:
    """Open a checkpoint of any dtypes, quantized ones included, by its published names.

    Raises CheckpointError if the directory, its config or its weights are missing, pickled,
    truncated or inconsistent.
    """
    config = read_config(path)
    where = _weight_map(path)
    names = sorted(set(where.values())) if where else [_single_file(path)]
    found = (entry for name in names for entry in _entries(path / name))
    entries = {e.name: e for e in found if where.get(e.name, e.file) == e.file}
    drafts, unread = _beside(path, config, names, entries)
    entries |= drafts
    for name, file in where.items():
        if name not in entries:
            raise CheckpointError(
                f"{path / file}: tensor {name} is missing, though {INDEX} names it; "
                "fetch the checkpoint again"
            )
    published = published_names(entries, config)
    entries = {published.get(name, name): entry for name, entry in entries.items()}
    tensors = {name: TensorInfo(e.dtype, e.shape, e.file) for name, e in entries.items()}
    check_counts(config, (info.shape for info in tensors.values()))
    return Checkpoint(
        path=path,
        config=config,
        tensors=tensors,
        entries=entries,
        files=MappedFiles(path),
        unread=unread,
        is_bare=bool(published),
    )


def _beside(
    path: Path, config: Mapping[str, Any], names: Sequence[str], named: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """Find draft tensors in files that nothing names; return them and the other such files.

    GLM-4.7 is published with ``mtp.safetensors`` beside its index.
    """
    found: dict[str, TensorEntry] = {}
    unread = []
    for file in sorted(path.glob("*.safetensors")):
        if file.name in names:
            continue
        try:
            entries = _entries(file)
        except CheckpointError:  # harmless: the file is not read
            entries = []
        known = any(e.name in named or e.name in found for e in entries)
        if entries and not known and all(is_draft(config, e.name) for e in entries):
            found |= {e.name: e for e in entries}
        else:
            unread.append(file.name)
    return found, tuple(unread)


def _weight_map(path: Path) -> dict[str, str]:
    """Return the index's tensor name -> file name; empty if one file holds all.

    That one file wins over an index of other files, as in transformers.
    """
    alone = (path / WEIGHTS).exists()
    if not (path / INDEX).exists():
        return {}
    try:
        where = read_object(path / INDEX, documents.INDEX).get("weight_map")
    except CheckpointError:
        if alone:
            return {}
        raise
    if alone and not (isinstance(where, dict) and WEIGHTS in where.values()):
        return {}
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{path / INDEX} has no weight_map; fetch it again")
    named = {file if isinstance(file, str) else "": name for name, file in where.items()}
    for file, name in named.items():
        if not file or Path(file).name != file:
            raise CheckpointError(
                f"{path / INDEX}: {where[name]!r} of {name} is no file name in its directory; "
                "fetch it again"
            )
        if not (path / file).is_file():
            raise CheckpointError(
                f"{path / file} is missing, though {INDEX} names it; fetch the checkpoint again"
            )
    return where


def _single_file(path: Path) -> str:
    found = sorted(p.name for p in path.glob("*.safetensors"))
    if WEIGHTS in found:
        return WEIGHTS
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path} has {len(found)} safetensors files and no {INDEX}; fetch the index too"
        )
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} has only pickled weights ({pickles[0]}), which can run code; convert them: "
            "load in transformers and save_pretrained(directory, safe_serialization=True)"
        )
    raise CheckpointError(f"{path} has no {WEIGHTS}; give a checkpoint with safetensors weights")


def _entries(file: Path) -> list[TensorEntry]:
    """Return the tensors of a file, after safetensors has found it sound."""
    check_regular(file)
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({e}); fetch it again"
        ) from e
    try:
        return sorted(entries_of(file.name, read_header(file)), key=attrgetter("name"))
    except UnknownDtype as e:
        raise CheckpointError(f"{file}: {e}, which this library does not know") from e
