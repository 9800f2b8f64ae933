"""A Hugging Face checkpoint with its weights decoded, read with safetensors alone."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from megatron_quant.ckpt.dialects import DIALECTS
from megatron_quant.ckpt.dialects.base import (
    INPUT_SCALE,
    SHAPE,
    Dialect,
    ModuleFormat,
    Stored,
    layer_of,
)
from megatron_quant.ckpt.reader import PLAIN_DTYPES, Checkpoint, TensorInfo, open_directory
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats import decode
from megatron_quant.formats.spec import Format
from megatron_quant.models.spec import Box

_WEIGHTS = ("weight", "weight_packed", "qweight")
_ELEMENTS, _ROWS = 1 << 24, 128
"""Of a block that is decoded at a time: most elements, and of what its rows are a multiple."""
_UNREAD = ("pre_quant_scale", "weight_zero_point", "weight_g_idx", "activation_scale")
"""Tensors of which a module's values depend where they are, but not in any format known here."""


class QuantizedCheckpoint:
    """A checkpoint directory; plain ones are read as well.

    modules: what the checkpoint's own config says of each quantized module (Hugging Face name).
    dialect: the convention that it is in; None where nothing is quantized.
    kv_cache: ``fp8`` where it has scales of an FP8 KV cache, else empty.

    Iterating yields the tensor names of the unquantized model. Tensors are read when asked for,
    one at a time.
    """

    def __init__(self, directory: Path):
        """Read the config and the headers of ``directory``.

        Raises CheckpointError where a file is missing or broken, or the config is not known.
        """
        files = open_directory(directory)
        self._open(files, matrices(files))

    @classmethod
    def over(cls, files: Checkpoint, modules: Iterable[str]) -> "QuantizedCheckpoint":
        """The checkpoint in ``files``, of whose ``modules`` the config says which are quantized.

        For verification: their tensors may be missing or malformed.
        """
        checkpoint = cls.__new__(cls)
        checkpoint._open(files, modules)
        return checkpoint

    def _open(self, files: Checkpoint, modules: Iterable[str]) -> None:
        self.directory = files.path
        self.config = files.config
        self.tensors = files.tensors
        self.dialect, self.kv_cache = _read_dialect(files)
        self.modules = _read_modules(files, self.dialect, tuple(modules))
        self._files = files

    def stored(self, module: str) -> tuple[Stored, ...]:
        """The tensors that a quantized module should have on disk."""
        assert self.dialect is not None
        fmt = self.modules[module]
        return self.dialect.stored(fmt.weights, fmt.inputs, layer_of(module))

    def __iter__(self) -> Iterator[str]:
        cache = tuple(f".{s.suffix}" for s in self.cache_scales)
        for name in self.tensors:
            module, _, suffix = name.rpartition(".")
            suffixes = [s.suffix for s in self.stored(module)] if module in self.modules else []
            if suffixes and suffix == suffixes[0]:
                yield f"{module}.weight"
            elif suffix not in suffixes and not name.endswith(cache):
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor that the unquantized model calls ``name``, one of those iterated."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.modules:
            return self.tensors[name].shape
        elements = self.stored(module)[0]
        info = self.tensors[f"{module}.{elements.suffix}"]
        if info.dtype in PLAIN_DTYPES:  # by mistake, which verifying reports
            return info.shape
        return elements.weight_shape(info.shape)

    @property
    def cache_scales(self) -> tuple[Stored, ...]:
        """What every attention module has beside its weights; empty without an FP8 KV cache."""
        return self.dialect.cache_scales if self.dialect and self.kv_cache else ()

    def raw(self, name: str) -> torch.Tensor:
        """A tensor as it is stored. Raises CheckpointError where there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: no tensor {name}")
        shape = self.tensors[name].shape
        return self._files.read(name, Box((0,) * len(shape), shape))

    def weight(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor that the unquantized model calls ``name``, decoded, in ``dtype``.

        Raises CheckpointError where one of its stored tensors is missing, or has a companion that
        this library does not know (such as a scale of the inputs folded into the weight).
        """
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.modules:
            return self._plain(name).to(dtype)
        self._refuse_companions(module)
        weights = self.modules[module].weights
        return decode(self.fields(module), weights, dtype)

    def parts(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The same in blocks of rows, equally cut for equal shapes. Raises as :meth:`weight`."""
        module, _, leaf = name.rpartition(".")
        shape = self.shape(name)
        if leaf != "weight" or module not in self.modules:
            self._check_plain(name)
            for start, stop in _row_blocks(shape):
                box = Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))
                yield self._files.read(name, box if shape else Box((), ())).to(dtype)
            return
        self._refuse_companions(module)
        weights, fields = self.modules[module].weights, self.fields(module)
        for start, stop in _row_blocks(shape):
            yield decode(_rows_of(fields, weights, start, stop), weights, dtype, (start, 0))

    def fields(self, module: str) -> dict[str, torch.Tensor]:
        """A quantized module's fields and pseudo fields by name, but ``SHAPE``.

        Raises CheckpointError where a tensor is missing or does not fit the others.
        """
        parts = {
            s: self.raw(f"{module}.{s.suffix}")
            for s in self.stored(module)
            if not s.optional or f"{module}.{s.suffix}" in self.tensors
        }
        self._check_parts(module, parts)
        return {s.field: s.from_disk(part) for s, part in parts.items() if s.field != SHAPE}

    def input_scale(self, module: str) -> float | None:
        """Tensor scale of a module's inputs (multiply to dequantize); None where it has none."""
        if module not in self.modules:
            return None
        for stored in self.stored(module):
            if stored.field == INPUT_SCALE:
                return stored.from_disk(self.raw(f"{module}.{stored.suffix}")).item()
        return None

    def _plain(self, name: str) -> torch.Tensor:
        tensor = self.raw(name)
        self._check_plain(name)
        return tensor

    def _check_plain(self, name: str) -> None:
        dtype = self.tensors[name].dtype
        if dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"{self.directory}: {name} is {dtype}, but its quantization_config "
                "does not say that it is quantized"
            )

    def _check_parts(self, module: str, parts: Mapping[Stored, torch.Tensor]) -> None:
        """Raise CheckpointError unless the tensors of a module fit one another and its format."""
        elements, first = next(iter(parts.items()))
        rows, cols = elements.weight_shape(tuple(first.shape)) if first.dim() == 2 else (0, 0)
        for stored, part in parts.items():
            name = f"{self.directory}: {module}.{stored.suffix}"
            wanted = stored.shape(rows, cols)
            if part.dtype not in (stored.dtype, *stored.also) or tuple(part.shape) != wanted:
                raise CheckpointError(
                    f"{name} is {part.dtype} {list(part.shape)}, but the config means "
                    f"{stored.dtype} {list(wanted)}"
                )
            if stored.field == SHAPE and not torch.equal(
                part, stored.to_disk(torch.tensor((rows, cols))).to(part.dtype)
            ):
                raise CheckpointError(
                    f"{name} is not what the config and the weight's shape mean (columns in their "
                    "natural order, a symmetric weight)"
                )

    def _refuse_companions(self, module: str) -> None:
        known = [s.suffix for s in self.stored(module)]
        for suffix in _UNREAD:
            if suffix not in known and f"{module}.{suffix}" in self.tensors:
                raise CheckpointError(f"{self.directory}: {module}.{suffix} is not read")


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last row of blocks of a few million elements: whole blocks of any format."""
    rows = shape[0] if shape else 1
    step = max(_ELEMENTS // max(prod(shape[1:]), 1) // _ROWS, 1) * _ROWS
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _rows_of(
    fields: Mapping[str, torch.Tensor], fmt: Format, start: int, stop: int
) -> dict[str, torch.Tensor]:
    """Fields of rows ``start`` to ``stop`` of a weight."""
    found = dict(fields)
    for field in fmt.fields:
        rows = field.block[0]
        if rows and field.name in fields:
            found[field.name] = fields[field.name][start // rows : -(-stop // rows)]
    return found


def matrices(files: Checkpoint) -> list[str]:
    """Modules that have a 2-D weight, packed or not."""
    weights = [n.rpartition(".") for n, t in files.tensors.items() if len(t.shape) == 2]
    return [module for module, _, leaf in weights if leaf in _WEIGHTS]


def _read_dialect(files: Checkpoint) -> tuple[Dialect | None, str]:
    """The dialect as the config spells it, and what the KV cache is."""
    quantization = files.config.get("quantization_config")
    if quantization is None:
        return None, ""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in DIALECTS:
        raise CheckpointError(
            f"{files.path}: quant_method {method!r} in config.json is not read; "
            f"known: {', '.join(DIALECTS)}"
        )
    dialect = DIALECTS[method].variant(quantization)
    return dialect, dialect.read_kv_cache(quantization)


def _read_modules(
    files: Checkpoint, dialect: Dialect | None, modules: tuple[str, ...]
) -> dict[str, ModuleFormat]:
    if dialect is None:
        return {}
    if dialect.by_tensors:
        modules = tuple(m for m in modules if not _is_plain(files.tensors.get(f"{m}.weight")))
    found = dialect.read_config(files.config["quantization_config"], modules)
    return {m: _as_found(files, dialect, m, fmt) for m, fmt in found.items()}


def _is_plain(info: TensorInfo | None) -> bool:
    return info is not None and info.dtype in PLAIN_DTYPES


def _as_found(files: Checkpoint, dialect: Dialect, module: str, fmt: ModuleFormat) -> ModuleFormat:
    """``fmt`` with the dtype in which the module's group scales are stored, where that is another.

    Producers round them to fp16 or bf16, before the codes: neither dtype holds the other's.
    """
    try:
        stored = dialect.stored(fmt.weights, fmt.inputs, layer_of(module))
    except FormatError as error:
        raise CheckpointError(f"{files.path}: {module}: {error}") from None
    for scale in (s for s in stored if s.field == "scale" and s.also):
        info = files.tensors.get(f"{module}.{scale.suffix}")
        if info is not None and info.dtype in scale.also and info.dtype != scale.dtype:
            fields = (
                replace(f, dtype=info.dtype) if f.name == "scale" else f for f in fmt.weights.fields
            )
            return replace(fmt, weights=replace(fmt.weights, fields=tuple(fields)))
    return fmt
