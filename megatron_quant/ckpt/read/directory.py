"""Read a Hugging Face checkpoint slice by slice: a rank reads only what it holds."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_quant import documents
from megatron_quant.ckpt.read.published import published_names
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
from megatron_quant.models import Box, Copy, Param, Role, check_counts, is_draft

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that an unquantized tensor may have."""
_TABLES = re.compile(r".*\.tid2eid")
"""Tables of whole numbers: DeepSeek-V4's experts of each token."""
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.attention\.masked_bias")
_PACKED = ("qweight", "weight_packed")
"""Last name parts of tensors that are a weight's codes, whatever a config says."""
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class TensorInfo:
    """The entry of one tensor in a safetensors header; ``file`` is a name in the directory.

    decoded: whether it is decoded from quantized tensors, so that no header says its dtype.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    decoded: bool = False


class Listed:
    """A checkpoint whose tensors are all known before one is read."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def unread(self) -> tuple[str, ...]:
        """Return tensors that cannot be read, like :attr:`Weights.unread`."""
        return ()

    def info(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and file of tensor ``name`` as it is read; None if there is none."""
        return self.tensors.get(name)

    def dense(self) -> Mapping[str, TensorInfo]:
        """Return all tensors."""
        return self.tensors

    def check(self, params: Iterable[Param]) -> tuple[str, ...]:
        """Check all tensors by :func:`check_tensors`."""
        return check_tensors(self.path, self.config, self.tensors, params)


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


class Weights(Protocol):
    """A checkpoint as loaders see it: tensors of an unquantized model, however they are stored.

    Iterating yields their names.
    """

    def __iter__(self) -> Iterator[str]: ...

    @property
    def path(self) -> Path:
        """Return its directory."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        ...

    @property
    def unread(self) -> tuple[str, ...]:
        """Return safetensors files in its directory that are not read, as nothing names them."""
        ...

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of tensor ``name``, in a float dtype that holds it exactly."""
        ...

    def info(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and file of what :meth:`read` gives; None if there is no tensor."""
        ...

    def dense(self) -> Mapping[str, TensorInfo]:
        """Return, by name, :meth:`info` of every tensor that a model of these weights may have."""
        ...

    def check(self, params: Iterable[Param]) -> tuple[str, ...]:
        """Check :meth:`dense` by :func:`check_tensors`."""
        ...


def check_tensors(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    params: Iterable[Param],
) -> tuple[str, ...]:
    """Check that ``tensors`` has every source of ``params`` in its shape, and nothing unexpected.

    Returns the names of tensors that may stay unused: buffers that old versions of transformers
    stored, ``lm_head.weight`` if the embedding takes its place, and, by ``config``, layers that
    only speculation needs. Raises CheckpointError for the first tensor that is missing, misshapen,
    not in bf16, fp16 or fp32, or unexpected.
    """
    params = tuple(params)
    sources = {s.name: s.shape for p in params for s in p.sources}
    for name, shape in sources.items():
        _check_tensor(path, tensors, name, shape)
    rest = [name for name in tensors if name not in sources]
    tied = all(p.role is not Role.OUTPUT for p in params)
    ignored = {n for n in rest if is_buffer(n) or (tied and n == "lm_head.weight")}
    ignored |= {n for n in rest if is_draft(config, n)}
    unexpected = [name for name in rest if name not in ignored]
    if unexpected:
        raise CheckpointError(
            f"{path}: {unexpected[0]} ({len(unexpected)} such) is no tensor of the "
            "architecture in config.json; correct config.json or remove the tensor"
        )
    return tuple(n for n in rest if n in ignored)


def plain_dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which the tensor of this name may be stored unquantized."""
    return (torch.int64, torch.int32) if _TABLES.fullmatch(name) else PLAIN_DTYPES


def is_buffer(name: str) -> bool:
    """Return whether a tensor is a buffer that old transformers stored and no model needs."""
    return _BUFFERS.fullmatch(name) is not None


def _check_tensor(
    path: Path, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]
) -> None:
    info = tensors.get(name)
    if info is None:
        module = name.rpartition(".")[0]
        packed = [n for n in beside(tensors, module) if n.rpartition(".")[2] in _PACKED]
        if packed:
            raise _packed_unsaid(path, packed[0])
        if name == "lm_head.weight":
            raise CheckpointError(
                f"{path}: tensor {name} is missing, and tie_word_embeddings in config.json does "
                "not say that the embedding takes its place: save the model with its head (of "
                "transformers a ...ForCausalLM, not a bare ...Model), fetch the checkpoint again, "
                "or correct config.json"
            )
        raise CheckpointError(
            f"{path}: tensor {name} is missing; fetch the checkpoint again, or correct config.json"
        )
    if info.shape != shape:
        raise CheckpointError(
            f"{path / info.file}: {name} has shape {list(info.shape)}, but config.json "
            f"asks for {list(shape)}; correct config.json"
        )
    if info.dtype not in plain_dtypes(name):
        if name.rpartition(".")[2] in _PACKED:
            raise _packed_unsaid(path, name)
        raise CheckpointError(
            f"{path / info.file}: {name} is stored as {info.dtype}; "
            "give a checkpoint in bf16, fp16 or fp32"
        )


def _packed_unsaid(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name.rpartition('.')[0]} is packed ({name}), but quantization_config in "
        "config.json does not say that it is quantized; correct quantization_config"
    )


def beside(tensors: Iterable[str], module: str) -> list[str]:
    """Return the names of all tensors of the module of this name."""
    return [name for name in tensors if name.rpartition(".")[0] == module]


def check_plain(path: Path, name: str, dtype: torch.dtype) -> None:
    """Raise CheckpointError if an unquantized tensor has a quantized one's dtype."""
    if dtype not in plain_dtypes(name):
        raise CheckpointError(
            f"{path}: {name} is {dtype}, but quantization_config in config.json does not say that "
            "it is quantized; correct quantization_config"
        )


def fill(local: torch.Tensor, copies: Sequence[Copy], checkpoint: Weights) -> None:
    """Copy each rectangle of the checkpoint into ``local``, in ``local``'s dtype and device.

    Elements outside all rectangles (vocabulary padding) keep their value.
    """
    with torch.no_grad():
        for copy in copies:
            local[copy.dst.index].copy_(checkpoint.read(copy.source.name, copy.src))


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
