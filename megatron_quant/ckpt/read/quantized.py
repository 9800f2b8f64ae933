"""Read a Hugging Face checkpoint with its weights decoded, by safetensors alone."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.dialects import (
    INPUT_SCALE,
    SHAPE,
    Dialect,
    ModuleFormat,
    Stored,
    dialect_of,
    layer_of,
    quantization_of,
    stored_by,
)
from megatron_quant.ckpt.read.checks import PLAIN_DTYPES, check_plain
from megatron_quant.ckpt.read.directory import Checkpoint, open_directory
from megatron_quant.ckpt.read.head import with_own_head
from megatron_quant.ckpt.read.packed_weight import (
    COLUMN_SCALE,
    GROUP_INDEX,
    Packed,
    open_packed,
    with_scale_dtype,
)
from megatron_quant.ckpt.read.published import PREFIX
from megatron_quant.ckpt.read.read_once import ReadOnce
from megatron_quant.ckpt.read.single_experts import single_experts
from megatron_quant.ckpt.read.source import Listed, TensorInfo, TensorSource
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.models import Box, table_names, whole

_WEIGHTS = ("weight", "weight_packed", "weight_blocks", "qweight")
_UNREAD = ("weight_zero_point",)
"""Tensors that would change a module's values, but that no format known here uses."""
_OF_ACTIVATIONS = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "activation_scale",
    "q_scale",
    "k_scale",
    "v_scale",
    "prob_scale",
)
"""Last name parts of tensors that no weight depends on."""


class QuantizedCheckpoint:
    """A checkpoint directory, quantized or plain.

    modules: the format of each quantized module (Hugging Face name), by the checkpoint's config.
    dialect: its dialect; None if nothing is quantized.
    kv_cache: ``fp8`` if it has scales of an FP8 KV cache, else empty.
    is_ordered, lists_exclusions: the results of the dialect's methods of these names.

    Iterating yields the tensor names of the unquantized model. Tensors are read on demand, one at
    a time.
    """

    def __init__(self, directory: Path):
        """Read the config and the headers of ``directory``.

        Raises CheckpointError if a file is missing or broken, or the config is not known.
        """
        files = opened(with_own_head(open_directory(directory)))
        self._open(files, matrices(files))

    @classmethod
    def over(cls, files: Listed, modules: Iterable[str]) -> "QuantizedCheckpoint":
        """Open the checkpoint in ``files``; its config tells which of ``modules`` are quantized.

        Their tensors may be missing or malformed: verification opens it like this.
        """
        checkpoint = cls.__new__(cls)
        checkpoint._open(files, modules)
        return checkpoint

    def _open(self, files: Listed, modules: Iterable[str]) -> None:
        self.path = files.path
        self.config = files.config
        self.tensors = files.tensors
        self.dialect, self.kv_cache, self.modules = None, "", {}
        self.is_ordered = self.lists_exclusions = True
        quantization = quantization_of(files.config, files.path)
        if quantization is not None:
            self.dialect = dialect_of(quantization, files.path, files.config)
            self.kv_cache = self.dialect.read_kv_cache(quantization)
            self.is_ordered = self.dialect.is_ordered(quantization)
            self.lists_exclusions = self.dialect.lists_exclusions(quantization)
            self.modules = _read_modules(files, self.dialect, quantization, tuple(modules))
        self._files = files

    @property
    def unread(self) -> tuple[str, ...]:
        """Return the files' own unread tensors."""
        return self._files.unread

    @cached_property
    def _of_table(self) -> frozenset[str]:
        return table_names(self.config)

    def stored(self, module: str) -> tuple[Stored, ...]:
        """Return the tensors that a quantized module should have on disk."""
        assert self.dialect is not None
        return stored_by(self.dialect, self.modules[module], layer_of(module))

    def __iter__(self) -> Iterator[str]:
        cache = tuple(f".{s.suffix}" for s in self.cache_scales)
        for name in self.tensors:
            module, _, suffix = name.rpartition(".")
            suffixes = [s.suffix for s in self.stored(module)] if module in self.modules else []
            if suffixes and suffix == suffixes[0]:
                yield f"{module}.weight"
            elif suffix not in (
                *suffixes,
                *((*GROUP_INDEX, COLUMN_SCALE) if suffixes else ()),
            ) and not name.endswith(cache):
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the unquantized model's tensor ``name``, one of those iterated."""
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in self.modules:
            return self.tensors[name].shape
        elements = self.stored(module)[0]
        info = self.tensors[f"{module}.{elements.suffix}"]
        if info.dtype in PLAIN_DTYPES:  # a mistake that verification reports
            return info.shape
        return elements.weight_shape(info.shape)

    @property
    def cache_scales(self) -> tuple[Stored, ...]:
        """Return every attention's cache scales; empty without an FP8 KV cache."""
        return self.dialect.cache_scales if self.dialect and self.kv_cache else ()

    def raw(self, name: str) -> torch.Tensor:
        """Read a tensor in its stored form; CheckpointError if there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}; fetch the checkpoint again")
        return self._files.read(name, whole(self.tensors[name].shape))

    def weight(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Decode the tensor that the unquantized model calls ``name``, in ``dtype``.

        Raises CheckpointError if one of its stored tensors is missing or malformed, or if there is
        one beside them that this library does not know (such as a zero point of symmetric codes).
        """
        if not self._is_packed(name):
            return self._plain(name).to(dtype)
        return self.packed(name.rpartition(".")[0]).whole().to(dtype)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of :meth:`weight`: fp32 if quantized, else in its stored dtype.

        It reads nothing else but tensors with a few numbers per row or column.
        """
        if not self._is_packed(name):
            return self._files.read(name, box)
        return self.packed(name.rpartition(".")[0]).read(box)

    def dense(self) -> Mapping[str, TensorInfo]:
        """Return, by name, :meth:`info` of all iterated tensors that a model needs.

        It leaves out tensors of activations, and biases of zeros that some packers add and the
        model's table lacks.
        """
        needed = (name for name in self if not self._is_needless(name))
        return {name: info for name in needed if (info := self.info(name)) is not None}

    def info(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and file of what :meth:`read` gives; None if there is no tensor."""
        if not self._is_packed(name):
            return self.tensors.get(name)
        packed = self.packed(name.rpartition(".")[0])
        file = self.tensors[f"{packed.module}.{packed.stored[0].suffix}"].file
        return TensorInfo(torch.float32, packed.shape, file, decoded=True)

    def fields(self, module: str) -> dict[str, torch.Tensor]:
        """Return a quantized module's fields and pseudo fields by name, without ``SHAPE``.

        Raises CheckpointError if a tensor is missing or does not fit the others, or if the columns
        are not in their natural order.
        """
        packed = self.packed(module)
        if packed.group_of_column is not None:
            raise CheckpointError(
                f"{self.path}: the columns of {module} are not in their natural order (g_idx), "
                "which no other dialect can store; quantize this checkpoint instead"
            )
        if packed.column_scale is not None:
            raise CheckpointError(
                f"{self.path}: {module}.{COLUMN_SCALE} multiplies the module's inputs, which no "
                "other dialect can store; quantize this checkpoint instead"
            )
        found = packed.fields(whole(packed.shape))
        for stored in self.stored(module):
            if stored.field not in found and stored.field != SHAPE:
                found[stored.field] = stored.from_disk(self.raw(f"{module}.{stored.suffix}"))
        return found

    def held(self) -> ReadOnce:
        """Return a reader of the stored tensors that reads each only once."""
        return ReadOnce(self._files)

    def packed(self, module: str, files: TensorSource | None = None) -> Packed:
        """Open the weight of a quantized module; CheckpointError if its tensors do not fit.

        files: the reader; None for the checkpoint itself.
        """
        known = [s.suffix for s in self.stored(module)]
        for suffix in _UNREAD:
            if suffix not in known and f"{module}.{suffix}" in self.tensors:
                raise CheckpointError(
                    f"{self.path}: {module}.{suffix} changes the weight in a way that this library "
                    "cannot read; give another checkpoint"
                )
        fmt = self.modules[module].weights
        return open_packed(files or self._files, module, fmt, self.stored(module))

    def _is_packed(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf == "weight" and module in self.modules

    def _is_needless(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if module in self.modules and leaf == "bias":
            return name not in self._of_table and not self.raw(name).any()
        return leaf in _OF_ACTIVATIONS

    def input_scale(self, module: str) -> float | None:
        """Return the tensor scale of a module's inputs (multiply to dequantize); None if none."""
        if module not in self.modules:
            return None
        for stored in self.stored(module):
            if stored.field == INPUT_SCALE:
                return stored.from_disk(self.raw(f"{module}.{stored.suffix}")).item()
        return None

    def _plain(self, name: str) -> torch.Tensor:
        tensor = self.raw(name)
        check_plain(self.path, name, tensor.dtype)
        return tensor


def opened(files: Checkpoint) -> Listed:
    """Return a checkpoint's files as a :class:`QuantizedCheckpoint` reads them.

    If it is quantized, that is by the names of single experts.
    Raises as :func:`single_experts`.
    """
    is_plain = quantization_of(files.config, files.path) is None
    return files if is_plain else single_experts(files)


def matrices(files: Listed) -> list[str]:
    """List the modules whose 2-D weight may be quantized.

    A plain matrix without scales is not quantized, whatever a config's patterns say.
    """
    weights = [n.rpartition(".") for n, t in files.tensors.items() if len(t.shape) == 2]
    modules = [module for module, _, leaf in weights if leaf in _WEIGHTS]
    scaled = {n.rpartition(".weight_")[0] for n in files.tensors}
    return [m for m in modules if m in scaled or not _is_plain(files.tensors.get(f"{m}.weight"))]


def _read_modules(
    files: Listed,
    dialect: Dialect,
    quantization: Mapping[str, Any],
    modules: tuple[str, ...],
) -> dict[str, ModuleFormat]:
    if dialect.by_tensors:
        modules = tuple(m for m in modules if not _is_plain(files.tensors.get(f"{m}.weight")))
    found = dialect.read_config(quantization, modules)
    if files.is_bare:
        _check_names(files, found, dialect.read_config(quantization, tuple(map(_bare, modules))))
    return {m: _as_found(files, dialect, m, fmt) for m, fmt in found.items()}


def _bare(module: str) -> str:
    return module.removeprefix(PREFIX)


def _check_names(
    files: Listed, found: Mapping[str, ModuleFormat], as_stored: Mapping[str, ModuleFormat]
) -> None:
    """Raise CheckpointError if the files' own names would match other modules in the config."""
    if {_bare(module): fmt for module, fmt in found.items()} != dict(as_stored):
        raise CheckpointError(
            f"{files.path}: names of tensors lack {PREFIX!r} (a bare ...Model was saved), and "
            "quantization_config lists modules by name: put it before the names in both, all but "
            "lm_head"
        )


def _is_plain(info: TensorInfo | None) -> bool:
    return info is not None and info.dtype in PLAIN_DTYPES


def _as_found(files: Listed, dialect: Dialect, module: str, fmt: ModuleFormat) -> ModuleFormat:
    """Return ``fmt`` with the dtype that the module's group scales really have.

    Producers round them to fp16 or bf16 before they make codes, and neither dtype holds all values
    of the other.
    """
    try:
        tensors = stored_by(dialect, fmt, layer_of(module))
    except FormatError as error:
        raise CheckpointError(f"{files.path}: {module}: {error}") from None
    for scale in (s for s in tensors if s.field == "scale" and s.also):
        info = files.tensors.get(f"{module}.{scale.suffix}")
        if info is not None and info.dtype in scale.also and info.dtype != scale.dtype:
            return ModuleFormat(with_scale_dtype(fmt.weights, info.dtype), fmt.inputs)
    return fmt
