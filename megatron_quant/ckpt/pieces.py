"""How one Hugging Face tensor is stored, and which cells of that a rectangle of it fills."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from megatron_quant.ckpt.dialects.base import Dialect, Stored
from megatron_quant.errors import FormatError
from megatron_quant.formats.spec import WHOLE, Format
from megatron_quant.models.spec import Box, Source

PLAIN = "plain"
"""Pseudo field: the weight itself, cast."""
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scheme:
    """How a tensor is stored: as it is (``weights`` is None) or in a format. Hashed by identity."""

    stored: tuple[Stored, ...]
    weights: Format | None = None
    inputs: Format | None = None

    def names(self, source: Source) -> list[str]:
        """Names on disk of the tensors that store ``source``."""
        if self.weights is None:
            return [source.name]
        return [f"{source.module}.{s.suffix}" for s in self.stored]

    def shapes(self, shape: Shape) -> list[Shape]:
        """Their shapes, for a weight of ``shape``."""
        if self.weights is None:
            return [shape]
        rows, cols = shape
        return [s.shape(rows, cols) for s in self.stored]


class Schemes:
    """One :class:`Scheme` per pair of formats, so that equal ones are the same object."""

    def __init__(self, dialect: Dialect, dtype: torch.dtype):
        """``dtype``: in which tensors that are not quantized are stored."""
        self._dialect = dialect
        self._plain = Scheme((Stored("", PLAIN, dtype, (1, 1)),))
        self._made: dict[tuple[Format, Format | None], Scheme] = {}

    def of(self, weights: Format | None, inputs: Format | None) -> Scheme:
        """The scheme of these formats; FormatError where the dialect has none."""
        if weights is None:
            return self._plain
        key = (weights, inputs)
        if key not in self._made:
            self._made[key] = Scheme(self._dialect.stored(*key), *key)
        return self._made[key]


@lru_cache(maxsize=16384)
def boxes(scheme: Scheme, shape: Shape, src: Box) -> tuple[Box | None, ...]:
    """For each stored tensor the box that rectangle ``src`` of a weight of ``shape`` fills.

    A stored element belongs to the rectangle with the first weight element that it stands for;
    None where the rectangle has no such element.
    """
    return tuple(_box(s, shape, src) for s in scheme.stored)


def _box(stored: Stored, shape: Shape, src: Box) -> Box | None:
    if stored.field == PLAIN:
        return src
    if stored.block == (WHOLE, WHOLE):
        first = not any(src.start)
        return Box((0,) * len(stored.scalar_shape), stored.scalar_shape) if first else None
    steps = _steps(stored.block, shape)
    start = tuple(-(-o // b) for o, b in zip(src.start, steps, strict=True))
    stop = tuple(-(-(o + n) // b) for o, n, b in zip(src.start, src.size, steps, strict=True))
    size = tuple(e - o for o, e in zip(start, stop, strict=True))
    return Box(start, size) if all(size) else None


@lru_cache(maxsize=16384)
def nbytes(scheme: Scheme, shape: Shape, src: Box) -> int:
    """Bytes that :func:`boxes` cover."""
    cells = zip(scheme.stored, boxes(scheme, shape, src), strict=True)
    return sum(prod(box.size) * stored.dtype.itemsize for stored, box in cells if box)


@lru_cache(maxsize=16384)
def crossed(scheme: Scheme, shape: Shape, src: Box) -> tuple[int, int] | None:
    """``(dim, block)`` of the first block that an edge of ``src`` inside the weight cuts."""
    for steps in _blocks(scheme, shape):
        for dim, step in enumerate(steps):
            start, stop = src.start[dim], src.start[dim] + src.size[dim]
            if start % step or (stop % step and stop != shape[dim]):
                return dim, step
    return None


def check_shape(scheme: Scheme, source: Source) -> None:
    """Raise FormatError unless ``source`` can be stored so.

    Blocks divide the inputs of the weight; only those of scales may be ragged along the outputs.
    """
    unfit = _unfit(scheme, source.shape)
    if unfit:
        raise FormatError(f"{source.name}: {unfit}")


@lru_cache(maxsize=16384)
def _unfit(scheme: Scheme, shape: Shape) -> str:
    if scheme.weights is None:
        return ""
    fmt = scheme.weights.name
    if len(shape) != 2:
        return f"{fmt} needs a matrix, not {shape}; exclude the weight in the recipe"
    for _, step in _blocks(scheme, shape):
        if shape[1] % step:
            return (
                f"its {shape[1]} inputs are not a multiple of {step}, as {fmt} needs;"
                " choose a smaller group_size, or exclude the weight in the recipe"
            )
    elements = next(s for s in scheme.stored if s.field == scheme.weights.fields[0].name)
    if shape[0] % (elements.block[0] or 1):
        return (
            f"its {shape[0]} outputs are not a multiple of {elements.block[0]}, as"
            f" {elements.suffix} packs them; exclude the weight or choose another export format"
        )
    return ""


def _blocks(scheme: Scheme, shape: Shape) -> list[Shape]:
    """Blocks of the codec's fields and of the stored tensors, but those of scalars."""
    if scheme.weights is None:
        return []
    blocks = [f.block for f in scheme.weights.fields] + [s.block for s in scheme.stored]
    return [_steps(block, shape) for block in blocks if block != (WHOLE, WHOLE)]


def _steps(block: tuple[int, int], shape: Shape) -> Shape:
    return tuple(b or n for b, n in zip(block, shape, strict=True))
