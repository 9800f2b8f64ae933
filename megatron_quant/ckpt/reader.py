"""Reading a Hugging Face checkpoint slice by slice: what a rank does not hold it does not read."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_quant.ckpt.files import DTYPES, INDEX
from megatron_quant.ckpt.source import read_config, read_json
from megatron_quant.errors import CheckpointError
from megatron_quant.models.spec import Box, Copy, Param, Role
from megatron_quant.models.structure import is_draft

WEIGHTS = "model.safetensors"

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In which a tensor that is not quantized may be stored."""
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.attention\.masked_bias")
_MAPPED = 1 << 27
"""Bytes of the files that stay mapped after they were read."""
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor; ``file`` is a name in the directory.

    decoded: whether it is what quantized tensors stand for, so that no header says its dtype.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    decoded: bool = False


class Listed:
    """A checkpoint all of whose tensors are known before one is read."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def info(self, name: str) -> TensorInfo | None:
        """Dtype, shape and file of what is read of ``name``; None where there is no such tensor."""
        return self.tensors.get(name)

    def dense(self) -> Mapping[str, TensorInfo]:
        """All tensors."""
        return self.tensors

    def check(self, params: Iterable[Param]) -> tuple[str, ...]:
        """As :func:`check_tensors`."""
        return check_tensors(self.path, self.config, self.tensors, params)


@dataclass(frozen=True)
class Checkpoint(Listed):
    """An open checkpoint directory: its config, and where each tensor lies.

    config: content of config.json. tensors: by name. Files are mapped into memory, so that only
    what is read is loaded; what was read longer ago than the last ``_MAPPED`` bytes is unmapped.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: dict[str, Any] = field(repr=False)
    _mapped: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The rectangle ``box`` of tensor ``name``, in its stored dtype; nothing else is read."""
        file = self.tensors[name].file
        try:
            self._unmap()
            if box.size == self.tensors[name].shape:  # the quicker call of the two
                part = self.files[file].get_tensor(name)
            else:
                part = self.files[file].get_slice(name)[box.index]
            self._mapped[file] = self._mapped.get(file, 0) + part.nbytes
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.path / file}: {name} cannot be read: {e}") from e
        assert tuple(part.shape) == box.size, (name, box, tuple(part.shape))
        return part

    def _unmap(self) -> None:
        """Open anew the files of which much was read: pages count as the process's memory."""
        if sum(self._mapped.values()) > _MAPPED:
            for file in self._mapped:
                self.files[file] = _open(self.path / file)
            self._mapped.clear()


class Weights(Protocol):
    """A checkpoint as loading sees it: tensors of an unquantized model, however they are stored.

    Iterating yields their names.
    """

    def __iter__(self) -> Iterator[str]: ...

    @property
    def path(self) -> Path:
        """Its directory."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        ...

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The rectangle ``box`` of tensor ``name``, in a float dtype that holds it exactly."""
        ...

    def info(self, name: str) -> TensorInfo | None:
        """Dtype, shape and file of what :meth:`read` gives; None where there is no such tensor."""
        ...

    def dense(self) -> Mapping[str, TensorInfo]:
        """:meth:`info` of every tensor that a model of these weights may have, by name."""
        ...

    def check(self, params: Iterable[Param]) -> tuple[str, ...]:
        """As :func:`check_tensors`, of :meth:`dense`."""
        ...


def check_tensors(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    params: Iterable[Param],
) -> tuple[str, ...]:
    """Every source of ``params`` is in ``tensors`` in its shape, and these are all such sources.

    Returns the names of tensors that are rightly unused: buffers that old versions of
    transformers stored, ``lm_head.weight`` where the embedding takes its place, and layers that
    only speculation needs, as ``config`` tells. Raises CheckpointError naming the first tensor
    that is missing, misshapen, not in bf16, fp16 or fp32, or unexpected.
    """
    params = tuple(params)
    sources = {s.name: s.shape for p in params for s in p.sources}
    for name, shape in sources.items():
        _check_tensor(path, tensors, name, shape)
    rest = [name for name in tensors if name not in sources]
    tied = all(p.role is not Role.OUTPUT for p in params)
    ignored = {n for n in rest if _BUFFERS.fullmatch(n) or (tied and n == "lm_head.weight")}
    ignored |= {n for n in rest if is_draft(config, n)}
    unexpected = [name for name in rest if name not in ignored]
    if unexpected:
        raise CheckpointError(
            f"{path}: {unexpected[0]} ({len(unexpected)} such) is no tensor of the "
            "architecture in config.json; correct config.json or remove the tensor"
        )
    return tuple(n for n in rest if n in ignored)


def _check_tensor(
    path: Path, tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]
) -> None:
    info = tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{path}: tensor {name} is missing; fetch the checkpoint again, or correct config.json"
        )
    if info.shape != shape:
        raise CheckpointError(
            f"{path / info.file}: {name} has shape {list(info.shape)} where config.json "
            f"asks for {list(shape)}; correct config.json"
        )
    if info.dtype not in PLAIN_DTYPES:
        raise CheckpointError(
            f"{path / info.file}: {name} is stored as {info.dtype}; "
            "give a checkpoint in bf16, fp16 or fp32"
        )


def check_plain(path: Path, name: str, dtype: torch.dtype) -> None:
    """Raise CheckpointError where a tensor that is not quantized has a quantized one's dtype."""
    if dtype not in PLAIN_DTYPES:
        raise CheckpointError(
            f"{path}: {name} is {dtype}, but its quantization_config does not say that it is "
            "quantized"
        )


def fill(local: torch.Tensor, copies: Sequence[Copy], checkpoint: Weights) -> None:
    """Copy each rectangle of the checkpoint into ``local``, in ``local``'s dtype and device.

    Elements that are in no rectangle (vocabulary padding) keep their value.
    """
    with torch.no_grad():
        for copy in copies:
            local[copy.dst.index].copy_(checkpoint.read(copy.source.name, copy.src))


def open_directory(path: Path) -> Checkpoint:
    """Open a checkpoint of whatever dtypes, quantized ones included.

    Raises CheckpointError where the directory, its config or its weights are missing, pickled,
    truncated or inconsistent.
    """
    config = read_config(path)
    where = _weight_map(path)
    names = sorted(set(where.values())) if where else [_single_file(path)]
    files = {name: _open(path / name) for name in names}
    tensors: dict[str, TensorInfo] = {}
    for file, handle in files.items():
        at = path / file
        for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
            if where.get(name, file) == file:
                tensors[name] = _info(at, handle, name)
    for name, file in where.items():
        if name not in tensors:
            raise CheckpointError(
                f"{path / file}: tensor {name} is missing, though {INDEX} names it; "
                "fetch the checkpoint again"
            )
    return Checkpoint(path, config, tensors, files)


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name of the index; empty where one file holds all (it then wins)."""
    if (path / WEIGHTS).exists() or not (path / INDEX).exists():
        return {}
    where = read_json(path / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{path / INDEX} has no weight_map; fetch it again")
    seen: set[str] = set()
    for name, file in where.items():
        if isinstance(file, str) and file in seen:
            continue
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{path / INDEX}: {file!r} of {name} is no file name in its directory"
            )
        if not (path / file).is_file():
            raise CheckpointError(
                f"{path / file} is missing, though {INDEX} names it; fetch the checkpoint again"
            )
        seen.add(file)
    return where


def _single_file(path: Path) -> str:
    found = sorted(p.name for p in path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path} has {len(found)} safetensors files and no {INDEX}; fetch the index too"
        )
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} has only pickled weights ({pickles[0]}), which can run code; convert it: "
            "load it in transformers and save_pretrained(directory, safe_serialization=True)"
        )
    raise CheckpointError(f"{path} has no {WEIGHTS}; give a checkpoint with safetensors weights")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({e}); fetch it again"
        ) from e


def _info(file: Path, handle: Any, name: str) -> TensorInfo:
    part = handle.get_slice(name)
    dtype = part.get_dtype()
    if dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {dtype}, which is not known here")
    return TensorInfo(_DTYPES[dtype], tuple(part.get_shape()), file.name)
