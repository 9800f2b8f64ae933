"""The record of one number format, frozen and readable without torch.

A weight is ``w_NK`` ([N = out, K = in], row-major). A format stores it as *fields*: tensors of
which every element stands for a ``block`` of the weight. This one fact is enough to slice a stored
tensor the way its weight is sliced, whoever holds the pieces.
"""

from dataclasses import dataclass, replace
from dataclasses import field as fact
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_quant.native import WHOLE

if TYPE_CHECKING:  # recipes and the command line's help are read without it
    import torch

CHANNEL = -1
"""Group size of one group the length of K."""
_SCALAR = (WHOLE, WHOLE)
_FLOATS = {"e4m3": (4, 3), "e2m1": (2, 1)}


@dataclass(frozen=True)
class Field:
    """One stored tensor of an encoded weight.

    Attributes:
        name: Its name among the format's fields.
        stored_as: torch's name of its dtype (``float8_e4m3fn``).
        block: (rows, cols) of the weight that one stored element stands for. ``WHOLE`` is the whole
            dimension. A field with ``(WHOLE, WHOLE)`` is a scalar and stored 0-dim.
    """

    name: str
    stored_as: str
    block: tuple[int, int]

    @cached_property
    def dtype(self) -> "torch.dtype":
        """Return the dtype that ``stored_as`` names."""
        import torch

        dtype = getattr(torch, self.stored_as)
        assert isinstance(dtype, torch.dtype), self.stored_as
        return dtype

    def in_dtype(self, dtype: "torch.dtype") -> "Field":
        """Return this field stored in another dtype."""
        return replace(self, stored_as=str(dtype).removeprefix("torch."))

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Return the field's shape for a weight of ``rows`` x ``cols``."""
        if self.block == _SCALAR:
            return ()
        sizes = zip(self.block, (rows, cols), strict=True)
        return tuple(-(-n // block) if block else 1 for block, n in sizes)


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a format computes, by the names of rules and elements in ``formats.numbers.arithmetic``.

    Attributes:
        scale: Rule from the statistic of a block to its scale.
        divide: How values are divided by the scale.
        element: How a quotient is rounded and packed.
        loop: Compiled loop of ``csrc`` that does all of this; empty where there is none.
        one_pass: Whether compiled loops read a row once for its scales and its elements.
    """

    scale: str
    divide: str
    element: str
    loop: str = ""
    one_pass: bool = False


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the elements of a tensor are stored; weights [N, K] and activations [tokens, K] alike.

    Attributes:
        name: Term that recipes use.
        bits: Bits per element, scales not counted.
        group_size: Elements along K that share a scale (``CHANNEL``: all of K); 0 where the
            tensor's scale is the finest.
        fields: Stored tensors in the order of ``encode``; the first one holds the elements.
        arithmetic: How values become elements.
        zero_point: Whether a block has a zero point beside its scale.
        signed: Whether a block's scale has the sign that gives its largest value the least code.
        largest: Amax of a tensor whose scale is 1; None where the format has no scale per tensor.
        full_blocks: Whether every block along K must be full. Matrix instructions of the engines
            and the tiles of their scales need that.
        scale_bits: Exponent and mantissa bits of block scales that are 8-bit floats.
        group_sizes: Sizes that a recipe may choose and engines read; empty where there is one.
        inputs: Formats that the inputs of such weights may have, None for weight-only; empty for a
            format that no recipe may choose for weights.
        algorithms: Ways to quantize such weights, keys of ``schema.ALGORITHMS``.
    """

    name: str
    bits: int
    group_size: int
    fields: tuple[Field, ...]
    arithmetic: Arithmetic
    zero_point: bool = False
    signed: bool = False
    largest: float | None = fact(default=None, compare=False)
    full_blocks: bool = fact(default=False, compare=False)
    scale_bits: tuple[int, int] | None = fact(default=None, compare=False)
    group_sizes: tuple[int, ...] = fact(default=(), compare=False)
    inputs: tuple[str | None, ...] = fact(default=(), compare=False)
    algorithms: tuple[str, ...] = fact(default=(), compare=False)

    def __hash__(self) -> int:
        return hash((self.name, self.group_size))  # cheap: plans look up a format for every tensor

    def field(self, name: str) -> Field:
        """Return the field called ``name``."""
        return next(f for f in self.fields if f.name == name)

    @cached_property
    def tensor_scale(self) -> bool:
        """Return whether ``encode`` needs the amax of the whole (fused) tensor.

        Otherwise scales follow from the statistic of the blocks alone.
        """
        return any(f.block == _SCALAR for f in self.fields)

    @cached_property
    def stat_block(self) -> tuple[int, int] | None:
        """Return the block that has a statistic; None where the only scale is the tensor's."""
        scales = [f.block for f in self.fields[1:] if f.block != _SCALAR]
        return scales[0] if scales else None

    @property
    def stat_parts(self) -> int:
        """Count the numbers in a block's statistic: its amax, or both ends where signs count."""
        return 2 if self.zero_point or self.signed else 1

    @property
    def float_bits(self) -> tuple[int, int] | None:
        """Return exponent and mantissa bits of an element; None where elements are integers."""
        return _FLOATS.get(self.arithmetic.element)


def regrouped(fmt: Format, group_size: int) -> Format:
    """Return an integer format with groups of any size, 1 included."""
    block = (1, WHOLE) if group_size == CHANNEL else (1, group_size)
    elements, *scales = fmt.fields
    fields = (elements, *(replace(f, block=block) for f in scales))
    return replace(fmt, group_size=group_size, fields=fields)
