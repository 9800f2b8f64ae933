"""What a number format is: one frozen row each.

A weight is ``w_NK`` ([N = out, K = in], row-major). Everything that a format stores about it
is a *field*: a tensor whose every element stands for a ``block`` of the weight. This one fact is
enough to slice a stored tensor the way its weight is sliced, whoever holds the pieces.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from megatron_quant.errors import FormatError

WHOLE = 0
"""In :attr:`Field.block`: the block spans the whole dimension."""
CHANNEL = -1
"""As a group size: one group the length of K."""


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
        sizes = zip(self.block, (rows, cols), strict=True)
        return tuple(-(-n // block) if block else 1 for block, n in sizes)


@dataclass(frozen=True)
class Format:
    """How the elements of a tensor are stored; weights [N, K] and activations [tokens, K] alike.

    name: the term that recipes use.
    bits: bits per element, scales not counted.
    group_size: elements along K that share a scale (``CHANNEL``: all of K); 0 where no scale is
        finer than the tensor's.
    fields: what ``encode`` returns, in order; the first one holds the elements.
    tensor_scale: whether ``encode`` needs the amax of the whole (fused) tensor. Where it does
        not, scales follow from the statistic of the blocks alone.
    zero_point: whether a block has a zero point beside its scale.
    """

    name: str
    bits: int
    group_size: int
    fields: tuple[Field, ...]
    tensor_scale: bool
    zero_point: bool = False

    def __hash__(self) -> int:
        return hash((self.name, self.group_size))  # plans count and look up formats by tensor

    def field(self, name: str) -> Field:
        """The field called ``name``."""
        return next(f for f in self.fields if f.name == name)

    @cached_property
    def stat_block(self) -> tuple[int, int] | None:
        """The block of which ``block_stat`` keeps a statistic; None with a tensor scale alone."""
        scales = [f.block for f in self.fields[1:] if f.block != (WHOLE, WHOLE)]
        return scales[0] if scales else None

    @property
    def stat_parts(self) -> int:
        """Numbers in the statistic of a block: its amax, or both ends with a zero point."""
        return 2 if self.zero_point else 1


_SCALAR = (WHOLE, WHOLE)
_ROW = (1, WHOLE)
_E4M3, _U8 = torch.float8_e4m3fn, torch.uint8


def _format(
    name: str, bits: int, group: int, fields: list[Field], zero_point: bool = False
) -> Format:
    tensor_scale = any(f.block == _SCALAR for f in fields)
    return Format(name, bits, group, tuple(fields), tensor_scale, zero_point)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in [
        # E4M3 with one scale: weight = elements * scale, scale = amax / 448.
        _format(
            "fp8",
            8,
            0,
            [Field("elements", _E4M3, (1, 1)), Field("scale", torch.float32, _SCALAR)],
        ),
        # The same with a scale per row: output channel of a weight, token of an activation.
        _format(
            "fp8_channel",
            8,
            CHANNEL,
            [Field("elements", _E4M3, (1, 1)), Field("scale", torch.float32, _ROW)],
        ),
        # The same with a scale per 128 x 128 block (DeepSeek-V3).
        _format(
            "fp8_block",
            8,
            128,
            [Field("elements", _E4M3, (1, 1)), Field("scale", torch.float32, (128, 128))],
        ),
        # The same with a scale per 1 x 128: the activations that go with fp8_block.
        _format(
            "fp8_group",
            8,
            128,
            [Field("elements", _E4M3, (1, 1)), Field("scale", torch.float32, (1, 128))],
        ),
        # INT8 with a scale per row, scale = amax / 127.5 (compressed-tensors).
        _format(
            "int8",
            8,
            CHANNEL,
            [Field("elements", torch.int8, (1, 1)), Field("scale", torch.float32, _ROW)],
        ),
        # INT8 with one scale: static activations.
        _format(
            "int8_tensor",
            8,
            0,
            [Field("elements", torch.int8, (1, 1)), Field("scale", torch.float32, _SCALAR)],
        ),
        # Symmetric INT4 in groups along K: eight codes (value + 8) an int32, bf16 scale per group.
        _format(
            "int4",
            4,
            128,
            [Field("elements", torch.int32, (1, 8)), Field("scale", torch.bfloat16, (1, 128))],
        ),
        # Asymmetric: value = (code - zero) * scale, zero a code in 0..15.
        _format(
            "int4_asym",
            4,
            128,
            [
                Field("elements", torch.int32, (1, 8)),
                Field("scale", torch.bfloat16, (1, 128)),
                Field("zero", _U8, (1, 128)),
            ],
            zero_point=True,
        ),
        # Symmetric INT8 in groups: four codes (value + 128) an int32.
        _format(
            "int8_group",
            8,
            128,
            [Field("elements", torch.int32, (1, 4)), Field("scale", torch.bfloat16, (1, 128))],
        ),
        # NVFP4: two E2M1 codes a byte (low nibble first), E4M3 scale per 16, fp32 scale per tensor.
        _format(
            "nvfp4",
            4,
            16,
            [
                Field("elements", _U8, (1, 2)),
                Field("block_scale", _E4M3, (1, 16)),
                Field("tensor_scale", torch.float32, _SCALAR),
            ],
        ),
        # OCP microscaling: E8M0 scale (exponent + 127) per 32; E4M3 and E2M1 elements.
        _format(
            "mxfp8",
            8,
            32,
            [Field("elements", _E4M3, (1, 1)), Field("scale", _U8, (1, 32))],
        ),
        _format(
            "mxfp4",
            4,
            32,
            [Field("elements", _U8, (1, 2)), Field("scale", _U8, (1, 32))],
        ),
    ]
}

_READ_ONLY: dict[str, Format] = {
    f.name: f
    for f in [
        # value = (code - zero) * scale, zero a code in 0..255.
        _format(
            "int8_asym",
            8,
            128,
            [
                Field("elements", torch.int32, (1, 4)),
                Field("scale", torch.bfloat16, (1, 128)),
                Field("zero", _U8, (1, 128)),
            ],
            zero_point=True,
        ),
    ]
}
"""What other tools write and engines hardly run: no recipe may choose it."""

GROUP_SIZES = dict.fromkeys(
    ("int4", "int4_asym", "int8_group", "int8_asym"), (32, 64, 128, CHANNEL)
)
"""Formats whose group size a recipe may choose, and the sizes that engines read."""


def get_format(name: str, group_size: int | None = None) -> Format:
    """The format called ``name``, with another ``group_size`` where the format allows one.

    Raises FormatError for an unknown name or a group size that no engine reads.
    """
    if name not in FORMATS:
        raise FormatError(f"unknown number format {name!r}; known: {', '.join(sorted(FORMATS))}")
    return _in_groups(FORMATS[name], group_size)


def stored_format(name: str, group_size: int | None = None) -> Format:
    """As :func:`get_format`, for what a checkpoint has: formats that no recipe may choose too."""
    return _in_groups(_READ_ONLY.get(name) or FORMATS[name], group_size)


def _in_groups(fmt: Format, group_size: int | None) -> Format:
    if group_size is None or group_size == fmt.group_size:
        return fmt
    allowed = GROUP_SIZES.get(fmt.name, (fmt.group_size,))
    if group_size not in allowed:
        spelled = ", ".join("channel" if g == CHANNEL else str(g) for g in allowed)
        raise FormatError(f"group_size {group_size} is not one of {fmt.name}'s: {spelled}")
    return regrouped(fmt, group_size)


def regrouped(fmt: Format, group_size: int) -> Format:
    """An integer format with groups of any size, 1 included."""
    block = _ROW if group_size == CHANNEL else (1, group_size)
    elements, *scales = fmt.fields
    fields = (elements, *(replace(f, block=block) for f in scales))
    return replace(fmt, group_size=group_size, fields=fields)
