"""How one Hugging Face tensor is stored, and which stored cells a rectangle of it fills."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm, prod

import torch

from megatron_quant.ckpt.dialects.base import SHAPE, Dialect, Layer, Stored
from megatron_quant.errors import FormatError
from megatron_quant.formats import Format
from megatron_quant.models import Box, Source
from megatron_quant.native import WHOLE

PLAIN = "plain"
"""Pseudo field: the weight itself, cast."""
Shape = tuple[int, ...]


class StorageScheme:
    """The storage of a tensor: plain (``weights`` is None) or in a format.

    It remembers its results for each shape, as a model has thousands of tensors alike.
    """

    def __init__(
        self,
        stored: tuple[Stored, ...],
        weights: Format | None = None,
        inputs: Format | None = None,
    ) -> None:
        self.stored, self.weights, self.inputs = stored, weights, inputs
        self._shapes: dict[Shape, tuple[Shape, ...]] = {}
        self._unfit: dict[Shape, str] = {}
        self._filled: dict[tuple[Shape, Box], tuple[Box | None, ...]] = {}
        self._splits: dict[tuple[Shape, Box], Split | None] = {}

    def names(self, source: Source) -> list[str]:
        """Return the names on disk of the tensors that store ``source``."""
        if self.weights is None:
            return [source.name]
        return [f"{source.module}.{s.suffix}" for s in self.stored]

    def stored_of(self, field: str) -> Stored | None:
        """Return the tensor that carries ``field``; None where nothing of it is stored."""
        return next((s for s in self.stored if s.field == field), None)

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shapes of the stored tensors, for a weight of ``shape``."""
        if shape not in self._shapes:
            plain = self.weights is None
            self._shapes[shape] = (shape,) if plain else tuple(s.shape(*shape) for s in self.stored)
        return self._shapes[shape]

    def boxes(self, shape: Shape, src: Box) -> tuple[Box | None, ...]:
        """Return for each stored tensor the box that ``src`` of a weight of ``shape`` fills.

        A stored element belongs to the rectangle with the first weight element that it stands for.
        None where the rectangle has no such element.
        """
        key = (shape, src)
        found = self._filled.get(key)
        if found is None:
            found = self._filled[key] = tuple(_box(s, shape, src) for s in self.stored)
        return found

    def nbytes(self, shape: Shape, src: Box) -> int:
        """Count the bytes that :meth:`boxes` cover."""
        filled = zip(self.stored, self.boxes(shape, src), strict=True)
        return sum(prod(box.size) * stored.dtype.itemsize for stored, box in filled if box)

    def split(self, shape: Shape, src: Box) -> "Split | None":
        """Return the first packing that an edge of ``src`` inside a weight of ``shape`` splits.

        Blocks that share a scale may be cut: their scales follow from statistics that the shards
        merged, and one of them writes each. Packed elements can only be written together.
        """
        key = (shape, src)
        if key not in self._splits:
            self._splits[key] = _first_split(self, shape, src)
        return self._splits[key]

    def check_shape(self, source: Source) -> None:
        """Raise FormatError unless the scheme can store ``source``.

        The last group of a row may be short, but for formats that need full blocks.
        """
        if source.shape not in self._unfit:
            self._unfit[source.shape] = _unfit(self, source.shape)
        if unfit := self._unfit[source.shape]:
            raise FormatError(f"{source.name}: {unfit}")


@dataclass(frozen=True)
class Split:
    """An edge between two shards inside elements that one stored element packs.

    Attributes:
        dim: Dim along which the edge cuts.
        count: Number of elements that are packed along it.
        suffix: Tensor that packs them.
    """

    dim: int
    count: int
    suffix: str


class StorageSchemes:
    """A maker of one :class:`StorageScheme` per pair of formats and kind of layer."""

    def __init__(self, dialect: Dialect, dtype: torch.dtype, kept: Mapping[str, torch.dtype]):
        """Store unquantized tensors in ``dtype``, or in their dtype in ``kept``."""
        self.dialect = dialect
        self._dtype, self._kept = dtype, kept
        self._plain: dict[torch.dtype, StorageScheme] = {}
        self._made: dict[tuple[Format, Format | None, Layer], StorageScheme] = {}

    def plain(self, name: str) -> StorageScheme:
        """Return the scheme of the tensor ``name`` where it is not quantized."""
        dtype = self._kept.get(name, self._dtype)
        if dtype not in self._plain:
            self._plain[dtype] = StorageScheme(
                (Stored(suffix="", field=PLAIN, dtype=dtype, block=(1, 1)),)
            )
        return self._plain[dtype]

    def of(
        self, weights: Format, inputs: Format | None, layer: Layer = Layer.DENSE
    ) -> StorageScheme:
        """Return the scheme of these formats; FormatError where the dialect has none."""
        key = (weights, inputs, layer)
        if key not in self._made:
            tensors = self.dialect.stored(*key)
            if weights.signed and not any(t.signed for t in tensors):
                raise FormatError(
                    f"{self.dialect.name} export has no signed scales: its readers are not known "
                    "to take a scale below 0; leave scales: signed out of the recipe, or export "
                    "compressed-tensors, gptq or auto-round"
                )
            self._made[key] = StorageScheme(tensors, weights, inputs)
        return self._made[key]


def _box(stored: Stored, shape: Shape, src: Box) -> Box | None:
    if stored.field == PLAIN or len(shape) != 2:  # a scale of the KV cache is no matrix
        return src
    if stored.field == SHAPE or stored.block == (WHOLE, WHOLE):
        whole = stored.shape(*shape)
        return Box((0,) * len(whole), whole) if not any(src.start) else None
    own = cells(stored, shape, src)
    if not all(own.size):
        return None
    return Box(stored.on_disk(own.start, 0), stored.on_disk(own.size, 1))


def cells(stored: Stored, shape: Shape, src: Box) -> Box:
    """Return the stored elements that rectangle ``src`` fills, by blocks of rows and of columns."""
    steps = _steps(stored.block, shape)
    start = tuple(-(-o // b) for o, b in zip(src.start, steps, strict=True))
    stop = tuple(-(-(o + n) // b) for o, n, b in zip(src.start, src.size, steps, strict=True))
    return Box(start, tuple(e - o for o, e in zip(start, stop, strict=True)))


def _first_split(scheme: StorageScheme, shape: Shape, src: Box) -> Split | None:
    for stored, packing in packings(scheme, shape):
        for dim, step in enumerate(packing):
            edges = (src.start[dim], src.start[dim] + src.size[dim])
            if any(edge % step and edge != shape[dim] for edge in edges):
                return Split(dim, step, stored.suffix)
    return None


def _unfit(scheme: StorageScheme, shape: Shape) -> str:
    if scheme.weights is None:
        return ""
    fmt = scheme.weights.name
    if len(shape) != 2:
        return f"{fmt} needs a matrix, not {shape}; exclude the weight in the recipe"
    if scheme.weights.full_blocks and shape[1] % scheme.weights.group_size:
        return (
            f"its {shape[1]} inputs are not a multiple of {scheme.weights.group_size}, as {fmt}"
            " needs; exclude the weight in the recipe"
        )
    for stored in scheme.stored:
        if shape[0] % stored.rows:
            return (
                f"its {shape[0]} outputs are not a multiple of {stored.rows}, as {stored.suffix}"
                " packs them; exclude the weight or choose another export format"
            )
    for stored, packing in packings(scheme, shape):
        for count, step, what in zip(shape, packing, ("outputs", "inputs"), strict=True):
            if count % step:
                return (
                    f"its {count} {what} are not a multiple of {step}, as {stored.suffix} packs"
                    " them; exclude the weight or choose another export format"
                )
    return ""


def packings(scheme: StorageScheme, shape: Shape) -> Iterator[tuple[Stored, Shape]]:
    """Yield stored tensors with the box of weight elements that one of their elements packs.

    An element packs everything it stands for. A scale packs nothing, unless one stored element
    holds several scales.
    """
    if scheme.weights is None:
        return
    for stored in scheme.stored:
        field = next((f for f in scheme.weights.fields if f.name == stored.field), None)
        if field is None or stored.block == (WHOLE, WHOLE):
            continue
        cells = _steps(field.block, shape)
        packed = tuple(map(lcm, _steps(stored.block, shape), cells))
        if field is scheme.weights.fields[0]:
            yield stored, packed
        else:
            yield stored, tuple(1 if p == c else p for p, c in zip(packed, cells, strict=True))


def _steps(block: tuple[int, int], shape: Shape) -> Shape:
    return tuple(b or n for b, n in zip(block, shape, strict=True))
