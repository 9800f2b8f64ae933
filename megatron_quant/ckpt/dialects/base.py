"""What a dialect is: the names, shapes and directions in which engines read a format."""

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
"""Pseudo field: the weight's [N, K] as int64 [2]. What is stored of it is stored whole."""
WEIGHT_SCALE = "weight_scale"
"""Pseudo field: the FP8 scale of the whole weight (multiply to dequantize), fp32, 0-dim."""
K_SCALE, V_SCALE = "k_scale", "v_scale"
"""Pseudo fields: FP8 scale of cached keys and values (multiply to dequantize), fp32, 0-dim."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""In which producers store scales that are no FP8."""
_SCALAR = (WHOLE, WHOLE)
_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


class Layer(Enum):
    """What a module is to an engine."""

    DENSE = "dense"
    EXPERT = "expert"  # one of a layer's routed experts, which run as one kernel


@lru_cache(maxsize=64)
def layer_of(module: str) -> Layer:
    """What the module of this Hugging Face name is."""
    return Layer.EXPERT if _EXPERT.search(module) else Layer.DENSE


def same(tensor: torch.Tensor) -> torch.Tensor:
    """The value as the codec made it."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor that a dialect writes for a quantized module ``P``: ``P.suffix``.

    field: the codec's field that it carries, or a pseudo field.
    block: as :attr:`megatron_quant.formats.spec.Field.block`, for the tensor as stored.
    scalar_shape: shape on disk where ``block`` is ``(WHOLE, WHOLE)``; not used for ``SHAPE``.
    to_disk, from_disk: between the codec's value and the stored one, on any slice of them that
        cuts no block. What is made of ``SHAPE`` has no ``from_disk``.
    dims: what each dim on disk counts: 0 blocks of rows, 1 blocks of columns, -1 nothing (a dim
        of size 1). ``(1, 0)`` is transposed.
    rows: of what is made of ``SHAPE``: of this many rows of the weight one word is packed.
    also: other dtypes in which producers store it; the values are used as they are.
    optional: whether producers may leave it out.
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

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape on disk for a weight of ``rows`` x ``cols``."""
        if self.field == SHAPE:
            return _derived_shape(self.to_disk, rows, cols)
        if self.block == _SCALAR:
            return self.scalar_shape
        cells = (-(-n // (b or n)) for b, n in zip(self.block, (rows, cols), strict=True))
        return self.on_disk(tuple(cells), 1)

    def fits(self, dtype: torch.dtype, on_disk: tuple[int, ...], shape: tuple[int, int]) -> bool:
        """Whether a tensor of this dtype and shape on disk may store it, for a weight of ``shape``.

        Scales of one number may have any float dtype and shape, E8M0 its own dtype or uint8.
        """
        dtypes = (self.dtype, *self.also)
        if self.block == _SCALAR and self.field != SHAPE:
            return prod(on_disk) == 1 and dtype in (*dtypes, *FLOATS)
        same_bytes = dtype == torch.float8_e8m0fnu and torch.uint8 in dtypes
        return on_disk == self.shape(*shape) and (dtype in dtypes or same_bytes)

    def constant(self, rows: int, cols: int) -> torch.Tensor:
        """What is stored of ``SHAPE`` for a weight of ``rows`` x ``cols``; not to be written to."""
        assert self.field == SHAPE, self.field
        return _derived(self.to_disk, rows, cols)

    def on_disk(self, cells: tuple[int, ...], absent: int) -> tuple[int, ...]:
        """A number by (rows, columns) as a number by dim on disk; ``absent`` for dims of size 1."""
        return tuple(absent if dim < 0 else cells[dim] for dim in self.dims)

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The [N, K] of a weight whose elements have ``shape`` on disk."""
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
    """An fp32 scale of the whole tensor, 0-dim."""
    return Stored(suffix=suffix, field=field, dtype=torch.float32, block=_SCALAR)


def scalar_of_one(suffix: str, field: str) -> Stored:
    """An fp32 scale of the whole tensor, stored as [1]."""
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
    """What a quantized checkpoint's own config says of one module."""

    weights: Format
    inputs: Format | None


class Dialect(ABC):
    """One on-disk convention, in both directions.

    extra_names: JSON files that a checkpoint of the dialect may have beside config.json.
    cache_scales: what is stored of an FP8 KV cache for each attention module; empty where the
        dialect has no such cache.
    by_tensors: whether a module whose plain weight is there is unquantized, whatever the config
        says, as engines have it.
    """

    name: str
    extra_names: tuple[str, ...] = ()
    cache_scales: tuple[Stored, ...] = ()
    by_tensors = False

    @abstractmethod
    def stored(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> tuple[Stored, ...]:
        """Tensors of a module in these formats; FormatError where the dialect has none."""

    @abstractmethod
    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """The ``quantization_config`` of config.json; FormatError where it cannot say ``plan``."""

    @abstractmethod
    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Of ``modules`` (Hugging Face names), those that ``quantization_config`` quantizes."""

    def read_kv_cache(self, config: Mapping[str, Any]) -> str:
        """``fp8`` where ``quantization_config`` declares an FP8 KV cache, else empty."""
        return ""

    def variant(self, config: Mapping[str, Any]) -> "Dialect":
        """The dialect as ``quantization_config`` spells it, where it has several packings."""
        return self

    def is_ordered(self, config: Mapping[str, Any]) -> bool:
        """Whether ``quantization_config`` leaves columns in their natural order of groups."""
        return True

    def lists_exclusions(self, config: Mapping[str, Any]) -> bool:
        """Whether ``quantization_config`` names what is not quantized.

        Where it does not, what engines never quantize is plain without being named.
        """
        return True

    def extra_files(self, plan: QuantPlan) -> dict[str, dict[str, Any]]:
        """Other JSON files of the dialect: file name -> content."""
        return {}

    def check_extra_files(
        self, config: Mapping[str, Any], files: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """What the dialect's other JSON files say otherwise than ``quantization_config``.

        files: content of those of ``extra_names`` that are there, by name.
        """
        return ()


@lru_cache(maxsize=1024)
def stored_by(dialect: Dialect, fmt: ModuleFormat, layer: Layer) -> tuple[Stored, ...]:
    """``dialect.stored``, made once for the many modules of one format."""
    return dialect.stored(fmt.weights, fmt.inputs, layer)
