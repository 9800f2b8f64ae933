"""What a number format is: one frozen row each.

A weight is ``w_NK`` ([N = out, K = in], row-major). Everything that a format stores about it
is a *field*: a tensor whose every element stands for a ``block`` of the weight. This one fact is
enough to slice a stored tensor the way its weight is sliced, whoever holds the pieces.
"""

from dataclasses import dataclass, replace

import torch

from megatron_quant.errors import FormatError

WHOLE = 0
"""In :attr:`Field.block`: the block spans the whole dimension."""


@dataclass(frozen=True)
class Field:
    """One stored tensor of an encoded weight.

    ``block = (rows, cols)``: how many weight elements one stored element stands for; ``WHOLE``
    is the whole dimension. A field whose block is ``(WHOLE, WHOLE)`` is a scalar, stored 0-dim.
    """

    name: str
    dtype: torch.dtype
    block: tuple[int, int]

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape of the field for a weight of ``rows`` x ``cols``."""
        if self.block == (WHOLE, WHOLE):
            return ()
        block_rows, block_cols = (b or n for b, n in zip(self.block, (rows, cols), strict=True))
        return (-(-rows // block_rows), -(-cols // block_cols))


@dataclass(frozen=True)
class Format:
    """How the elements of a tensor are stored.

    name: the term that recipes use.
    bits: bits per element, scales not counted.
    group_size: elements along K that share a scale; 0 where only the tensor has one.
    fields: what ``encode`` returns, in order; the first one holds the elements.
    tensor_scale: whether ``encode`` needs the amax of the whole (fused) tensor. Where it does
        not, scales follow from the weight alone and an amax that is passed is ignored.
    """

    name: str
    bits: int
    group_size: int
    fields: tuple[Field, ...]
    tensor_scale: bool

    def field(self, name: str) -> Field:
        """The field called ``name``."""
        return next(f for f in self.fields if f.name == name)


_SCALAR = (WHOLE, WHOLE)

FORMATS: dict[str, Format] = {
    # E4M3 with one scale: weight = elements * scale, scale = amax / 448.
    "fp8": Format(
        "fp8",
        8,
        0,
        (
            Field("elements", torch.float8_e4m3fn, (1, 1)),
            Field("scale", torch.float32, _SCALAR),
        ),
        tensor_scale=True,
    ),
    # NVFP4: two E2M1 codes a byte (low nibble first), E4M3 scale per 16, fp32 scale per tensor.
    "nvfp4": Format(
        "nvfp4",
        4,
        16,
        (
            Field("elements", torch.uint8, (1, 2)),
            Field("block_scale", torch.float8_e4m3fn, (1, 16)),
            Field("tensor_scale", torch.float32, _SCALAR),
        ),
        tensor_scale=True,
    ),
    # Symmetric INT4 in groups along K: eight codes (value + 8) an int32, bf16 scale per group.
    "int4": Format(
        "int4",
        4,
        128,
        (
            Field("elements", torch.int32, (1, 8)),
            Field("scale", torch.bfloat16, (1, 128)),
        ),
        tensor_scale=False,
    ),
}

GROUP_SIZES = {"int4": (32, 64, 128)}
"""Formats whose group size a recipe may choose, and the sizes that engines read."""


def get_format(name: str, group_size: int | None = None) -> Format:
    """The format called ``name``, with another ``group_size`` where the format allows one.

    Raises FormatError for an unknown name or a group size that no engine reads.
    """
    if name not in FORMATS:
        raise FormatError(f"unknown number format {name!r}; known: {', '.join(sorted(FORMATS))}")
    fmt = FORMATS[name]
    if group_size is None or group_size == fmt.group_size:
        return fmt
    allowed = GROUP_SIZES.get(name, (fmt.group_size,))
    if group_size not in allowed:
        raise FormatError(
            f"group_size {group_size} is not one of {name}'s: {', '.join(map(str, allowed))}"
        )
    fields = tuple(
        replace(f, block=(1, group_size)) if f.block == (1, fmt.group_size) else f
        for f in fmt.fields
    )
    return replace(fmt, group_size=group_size, fields=fields)
