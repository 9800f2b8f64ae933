"""What is known of one number format: a frozen record, which needs no torch to be read.

A weight is ``w_NK`` ([N = out, K = in], row-major). Everything that a format stores about it
is a *field*: a tensor whose every element stands for a ``block`` of the weight. This one fact is
enough to slice a stored tensor the way its weight is sliced, whoever holds the pieces.
"""

from dataclasses import dataclass, replace
from dataclasses import field as fact
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_quant.native import WHOLE

if TYPE_CHECKING:  # recipes and the command line's help are read without it
    import torch

CHANNEL = -1
"""As a group size: one group the length of K."""
_SCALAR = (WHOLE, WHOLE)
_FLOATS = {"e4m3": (4, 3), "e2m1": (2, 1)}


@dataclass(frozen=True)
class Field:
    """One stored tensor of an encoded weight.

    stored_as: torch's name of its dtype (``float8_e4m3fn``).
    ``block = (rows, cols)``: how many weight elements one stored element stands for; ``WHOLE``
    is the whole dimension. A field whose block is ``(WHOLE, WHOLE)`` is a scalar, stored 0-dim.
    """

    name: str
    stored_as: str
    block: tuple[int, int]

    @cached_property
    def dtype(self) -> "torch.dtype":
        """The dtype that ``stored_as`` names."""
        import torch

        dtype = getattr(torch, self.stored_as)
        assert isinstance(dtype, torch.dtype), self.stored_as
        return dtype

    def in_dtype(self, dtype: "torch.dtype") -> "Field":
        """The field stored in another dtype."""
        return replace(self, stored_as=str(dtype).removeprefix("torch."))

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape of the field for a weight of ``rows`` x ``cols``."""
        if self.block == _SCALAR:
            return ()
        sizes = zip(self.block, (rows, cols), strict=True)
        return tuple(-(-n // block) if block else 1 for block, n in sizes)


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a format computes, by the names of rules and elements in ``formats.numbers.arithmetic``.

    scale: the rule from the statistic of a block to its scale. divide: how values are divided by
    it. element: how a quotient is rounded and packed. loop: the compiled loop of ``csrc`` that
    does all of this; empty where there is none.
    one_pass: whether compiled loops find scales and elements of a row in one reading of it.
    """

    scale: str
    divide: str
    element: str
    loop: str = ""
    one_pass: bool = False


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the elements of a tensor are stored; weights [N, K] and activations [tokens, K] alike.

    name: the term that recipes use.
    bits: bits per element, scales not counted.
    group_size: elements along K that share a scale (``CHANNEL``: all of K); 0 where no scale is
        finer than the tensor's.
    fields: what ``encode`` returns, in order; the first one holds the elements.
    arithmetic: how values become elements.
    zero_point: whether a block has a zero point beside its scale.
    largest: the amax of a tensor whose scale is 1; None where the format has no scale per tensor.
    full_blocks: whether no block along K may be short, as the engines' matrix instructions and
        the tiles of their scales have it.
    scale_bits: exponent and mantissa of the blocks' scales, where these are floats of 8 bits.
    group_sizes: the sizes that a recipe may choose, all of which engines read; empty where there
        is one.
    inputs: formats that the inputs of such weights may have, None for weight-only; empty for a
        format that no recipe may choose for weights.
    algorithms: how the scales of such weights may be found, keys of ``schema.ALGORITHMS``.
    """

    name: str
    bits: int
    group_size: int
    fields: tuple[Field, ...]
    arithmetic: Arithmetic
    zero_point: bool = False
    largest: float | None = fact(default=None, compare=False)
    full_blocks: bool = fact(default=False, compare=False)
    scale_bits: tuple[int, int] | None = fact(default=None, compare=False)
    group_sizes: tuple[int, ...] = fact(default=(), compare=False)
    inputs: tuple[str | None, ...] = fact(default=(), compare=False)
    algorithms: tuple[str, ...] = fact(default=(), compare=False)

    def __hash__(self) -> int:
        return hash((self.name, self.group_size))  # plans count and look up formats by tensor

    def field(self, name: str) -> Field:
        """The field called ``name``."""
        return next(f for f in self.fields if f.name == name)

    @cached_property
    def tensor_scale(self) -> bool:
        """Whether ``encode`` needs the amax of the whole (fused) tensor.

        Where it does not, scales follow from the statistic of the blocks alone.
        """
        return any(f.block == _SCALAR for f in self.fields)

    @cached_property
    def stat_block(self) -> tuple[int, int] | None:
        """The block of which ``block_stat`` keeps a statistic; None with a tensor scale alone."""
        scales = [f.block for f in self.fields[1:] if f.block != _SCALAR]
        return scales[0] if scales else None

    @property
    def stat_parts(self) -> int:
        """Numbers in the statistic of a block: its amax, or both ends with a zero point."""
        return 2 if self.zero_point else 1

    @property
    def float_bits(self) -> tuple[int, int] | None:
        """Exponent and mantissa of an element; None where elements are integers."""
        return _FLOATS.get(self.arithmetic.element)


def regrouped(fmt: Format, group_size: int) -> Format:
    """An integer format with groups of any size, 1 included."""
    block = (1, WHOLE) if group_size == CHANNEL else (1, group_size)
    elements, *scales = fmt.fields
    fields = (elements, *(replace(f, block=block) for f in scales))
    return replace(fmt, group_size=group_size, fields=fields)
