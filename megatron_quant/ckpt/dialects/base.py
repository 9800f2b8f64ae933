"""Dialects: the names, shapes and directions in which engines read a format."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import prod
from typing import Any

import torch

from megatron_quant.formats import Format
from megatron_quant.native import WHOLE
from megatron_quant.recipes import QuantPlan

INPUT_SCALE = "input_scale"
"""Pseudo field: the activations' tensor scale (multiply to dequantize), fp32, 0-dim."""
SHAPE = "shape"
"""Pseudo field: the weight's [N, K] as int64 [2]. Tensors made of it are stored whole."""
WEIGHT_SCALE = "weight_scale"
"""Pseudo field: the FP8 scale of the whole weight (multiply to dequantize), fp32, 0-dim."""
K_SCALE, V_SCALE = "k_scale", "v_scale"
"""Pseudo fields: FP8 scale of cached keys and values (multiply to dequantize), fp32, 0-dim."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes in which producers store scales that are not FP8."""
_SCALAR = (WHOLE, WHOLE)
_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


class Layer(Enum):
    """The kind of a module to an engine."""

    DENSE = "dense"
    EXPERT = "expert"  # one of a layer's routed experts, which run as one kernel


@lru_cache(maxsize=64)
def layer_of(module: str) -> Layer:
    """Return the kind of the module with this Hugging Face name."""
    return Layer.EXPERT if _EXPERT.search(module) else Layer.DENSE


def same(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor unchanged."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor that a dialect writes for a quantized module ``P``: ``P.suffix``.

    Attributes:
        suffix: Last part of its name.
        field: Field of the codec that it carries, or a pseudo field.
        dtype: Dtype on disk.
        block: (rows, cols) of the weight that one stored element stands for, as in
            :attr:`megatron_quant.formats.record.Field.block`.
        scalar_shape: Shape on disk where ``block`` is ``(WHOLE, WHOLE)``; not used for ``SHAPE``.
        to_disk: Turns the codec's value into the stored one, on any slice that cuts no block.
        from_disk: Turns it back. A tensor that is made of ``SHAPE`` has none.
        dims: Meaning of each dim on disk: 0 counts blocks of rows, 1 blocks of columns, -1 nothing
            (a dim of size 1). ``(1, 0)`` is transposed.
        rows: For a tensor made of ``SHAPE``, rows of the weight that one word packs.
        also: Other dtypes in which producers store it; the values are used unchanged.
        optional: Whether producers may leave it out.
        signed: Whether readers take scales below 0: AutoRound gives the largest value of a group
            the code -8, and vLLM, SGLang and transformers multiply a code by any scale, where
            inputs are not quantized. Of TensorRT-LLM (``modelopt``) it is not known.
    """

    suffix: str
    field: str
    dtype: torch.dtype
    block: tuple[int, int]
    scalar_shape: tuple[int, ...] = ()
    to_disk: Callable[[torch.Tensor], torch.Tensor] = same
    from_disk: Callable[[torch.Tensor], torch.Tensor] = same
    dims: tuple[int, ...] = (0, 1)
    rows: int = 1
    also: tuple[torch.dtype, ...] = ()
    optional: bool = False
    signed: bool = False

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Return the shape on disk for a weight of ``rows`` x ``cols``."""
        if self.field == SHAPE:
            return _derived_shape(self.to_disk, rows, cols)
        if self.block == _SCALAR:
            return self.scalar_shape
        cells = (-(-n // (b or n)) for b, n in zip(self.block, (rows, cols), strict=True))
        return self.on_disk(tuple(cells), 1)

    def fits(self, dtype: torch.dtype, on_disk: tuple[int, ...], shape: tuple[int, int]) -> bool:
        """Whether a tensor of this dtype and shape on disk may store it, for a weight of ``shape``.

        Scales of one number may have any float dtype and shape. E8M0 may have its own dtype, for
        uint8 and for fp32, which holds its powers of two.
        """
        dtypes = (self.dtype, *self.also)
        if self.block == _SCALAR and self.field != SHAPE:
            return prod(on_disk) == 1 and dtype in (*dtypes, *FLOATS)
        e8m0 = dtype == torch.float8_e8m0fnu and (
            torch.uint8 in dtypes or (self.field == "scale" and self.dtype == torch.float32)
        )
        return on_disk == self.shape(*shape) and (dtype in dtypes or e8m0)

    def constant(self, rows: int, cols: int) -> torch.Tensor:
        """Return the tensor made of ``SHAPE`` for ``rows`` x ``cols``; do not write to it."""
        assert self.field == SHAPE, self.field
        return _derived(self.to_disk, rows, cols)

    def on_disk(self, cells: tuple[int, ...], absent: int) -> tuple[int, ...]:
        """Turn a number by (rows, columns) into one by dim on disk.

        Dims of size 1 get ``absent``.
        """
        return tuple(absent if dim < 0 else cells[dim] for dim in self.dims)

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the [N, K] of a weight whose elements have ``shape`` on disk."""
        rows, cols = (shape[self.dims.index(d)] * self.block[d] for d in (0, 1))
        return rows, cols


@lru_cache(maxsize=1024)
def _derived_shape(
    of_shape: Callable[[torch.Tensor], torch.Tensor], rows: int, cols: int
) -> tuple[int, ...]:
    return tuple(_derived(of_shape, rows, cols).shape)


@lru_cache(maxsize=8)
def _derived(
    of_shape: Callable[[torch.Tensor], torch.Tensor], rows: int, cols: int
) -> torch.Tensor:
    return of_shape(torch.tensor((rows, cols)))


def scalar(suffix: str, field: str) -> Stored:
    """Describe an fp32 scale of the whole tensor, 0-dim."""
    return Stored(suffix=suffix, field=field, dtype=torch.float32, block=_SCALAR)


def scalar_of_one(suffix: str, field: str) -> Stored:
    """Describe an fp32 scale of the whole tensor, stored as [1]."""
    return Stored(
        suffix=suffix,
        field=field,
        dtype=torch.float32,
        block=_SCALAR,
        scalar_shape=(1,),
        to_disk=_one,
        from_disk=_zero_dim,
    )


def _one(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(1)


def _zero_dim(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(())


@dataclass(frozen=True)
class ModuleFormat:
    """The formats that a quantized checkpoint's own config states for one module."""

    weights: Format
    inputs: Format | None


class Dialect(ABC):
    """One on-disk convention, in both directions.

    Attributes:
        name: Name of the dialect, a choice of ``--export-format``.
        extra_names: JSON files that a checkpoint of the dialect may have beside config.json.
        cache_scales: Tensors of an FP8 KV cache for each attention module; empty where the dialect
            has no such cache.
        by_tensors: Whether a module that has a plain weight counts as unquantized, whatever the
            config says. Engines do so.
        stacks: Whether its files have one tensor for the routed experts of a layer.
        carries: Whether it leaves weights that no rule quantizes in the source's own format.
    """

    name: str
    extra_names: tuple[str, ...] = ()
    cache_scales: tuple[Stored, ...] = ()
    by_tensors = False
    stacks = False
    carries = False

    def of_model(self, config: Mapping[str, Any]) -> "Dialect":
        """Return the form of it that a model's config.json means: most dialects have one."""
        return self

    @abstractmethod
    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """List the tensors of a module in these formats; FormatError where the dialect has none."""

    @abstractmethod
    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """Return ``quantization_config`` for config.json.

        FormatError where it cannot express ``plan``.
        """

    @abstractmethod
    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Return those of ``modules`` (Hugging Face names) that the config quantizes."""

    def read_kv_cache(self, config: Mapping[str, Any]) -> str:
        """Return ``fp8`` where ``quantization_config`` declares an FP8 KV cache, else empty."""
        return ""

    def variant(self, config: Mapping[str, Any]) -> "Dialect":
        """Return the dialect with the packing that ``quantization_config`` states."""
        return self

    def is_ordered(self, config: Mapping[str, Any]) -> bool:
        """Whether ``quantization_config`` leaves columns in their natural order of groups."""
        return True

    def lists_exclusions(self, config: Mapping[str, Any]) -> bool:
        """Return whether ``quantization_config`` names what is not quantized.

        Where it does not, what engines never quantize is plain without being named.
        """
        return True

    def extra_files(self, plan: QuantPlan) -> dict[str, dict[str, Any]]:
        """Return the dialect's other JSON files: file name -> content."""
        return {}

    def check_extra_files(
        self, config: Mapping[str, Any], files: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """List where the dialect's other JSON files contradict ``quantization_config``.

        Args:
            config: The ``quantization_config``.
            files: Content of those of ``extra_names`` that exist, by name.
        """
        return ()


@lru_cache(maxsize=1024)
def stored_by(dialect: Dialect, fmt: ModuleFormat, layer: Layer) -> tuple[Stored, ...]:
    """Return ``dialect.stored``, made once for the many modules of one format."""
    return dialect.stored(fmt.weights, fmt.inputs, layer)
