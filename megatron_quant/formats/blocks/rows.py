"""A tensor as rows, with all that it takes to encode or decode any slice of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron_quant.errors import FormatError
from megatron_quant.formats.backends import Loops, loops_for
from megatron_quant.formats.blocks.chunks import as_rows
from megatron_quant.formats.blocks.stat import block_stat, cuts, row_stat
from megatron_quant.formats.numbers import Kernel, ScaleFields, check_dtype, kernel_of
from megatron_quant.formats.spec import Field, Format
from megatron_quant.native import WHOLE, Cuts, Origin


def check_storable(x: Tensor, fmt: Format, stat: Tensor | None, origin: Origin) -> None:
    """Raise FormatError where a piece [..., K] cannot be stored in ``fmt``.

    Without a statistic, the piece must hold all of each block that it touches.
    """
    check_dtype(x)
    multiple = kernel_of(fmt).element.packed
    if stat is None and fmt.full_blocks:
        multiple = fmt.group_size
    if x.shape[-1] % multiple:
        raise FormatError(
            f"{fmt.name} needs the last dim to be a multiple of {multiple}, but the shape is "
            f"{list(x.shape)}; exclude this weight in the recipe or choose fp8 for it"
        )
    if origin[1] % multiple:
        raise FormatError(
            f"{fmt.name} stores {multiple} columns together, which a cut at column {origin[1]} "
            "splits; choose another parallel layout or format"
        )


def row_scale(dscale: Tensor | None, x: Tensor, fmt: Format) -> Tensor:
    """Expand ``dscale`` ([] or [E, 1, 1]) to each of the R rows of ``x`` [..., K]: fp32 [R, 1].

    Return ones where the format has no scale per tensor.
    """
    leading = x.shape[:-1]
    if not fmt.tensor_scale:
        return torch.ones((), device=x.device).expand(leading.numel(), 1)
    assert dscale is not None, f"{fmt.name} needs the tensor's scale"
    if dscale.dim() == 0:
        return dscale.float().expand(leading.numel(), 1)
    assert dscale.shape == (leading[0], 1, 1) and len(leading) == 2, (dscale.shape, x.shape)
    return dscale.float().expand(*leading, 1).reshape(-1, 1)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How R rows of K values are stored.

    Attributes:
        fmt: Their format.
        dscale_R1: Scale of the tensor for each row.
        columns: How the blocks lie along K.
        scales: Scale fields of every row of blocks; None where they follow from each row's values.
        block_R: Row of blocks that each row lies in; None where each has its own.
    """

    fmt: Format
    dscale_R1: Tensor
    columns: Cuts
    scales: ScaleFields | None
    block_R: Tensor | None

    @property
    def kernel(self) -> Kernel:
        """Return the arithmetic of the format."""
        return kernel_of(self.fmt)

    def _given(self, chunk: slice) -> ScaleFields:
        assert self.scales is not None
        if self.block_R is None:
            return tuple(f[chunk] for f in self.scales)
        return tuple(f.index_select(0, self.block_R[chunk]) for f in self.scales)

    def _own(self, chunk: slice, x_RK: Tensor) -> ScaleFields:
        if not self.fmt.stat_block:
            return ()
        stat = row_stat(x_RK, self.columns, self.fmt.stat_parts)
        return self.kernel.scale.fields(stat, self.dscale_R1[chunk], x_RK.dtype)

    def encode(self, chunk: slice, x_RK: Tensor) -> tuple[Tensor, ScaleFields]:
        """Encode the rows ``chunk``, whose values are ``x_RK``, to elements and scale fields."""
        loops = self._in_one_pass(x_RK)
        if loops is not None:
            elements, scale = loops.nvfp4_encode(x_RK, self.dscale_R1[chunk])
            return elements, (scale,)
        scales = self._own(chunk, x_RK) if self.scales is None else self._given(chunk)
        dscale_R1 = self.dscale_R1[chunk]
        return self.kernel.elements(x_RK, scales, dscale_R1, self.columns), scales

    def decode(self, chunk: slice, stored: Tensor) -> Tensor:
        """Decode the stored elements of the rows ``chunk`` to fp32; needs ``scales``."""
        return self.kernel.values(stored, self._given(chunk), self.dscale_R1[chunk], self.columns)

    def lost(self, x_RK: Tensor, stored: Tensor) -> tuple[float, float]:
        """Sum the squares of all rows and of their errors: see :meth:`Kernel.lost`."""
        scales = self._given(slice(None))
        return self.kernel.lost(x_RK, stored, scales, self.dscale_R1, self.columns)

    def requantize(self, chunk: slice, x_RK: Tensor) -> Tensor:
        """Encode and decode ``x_RK``; the result is fp32 or rounded to its dtype."""
        loops = self._in_one_pass(x_RK)
        if loops is not None:
            return loops.nvfp4_fake_quant(x_RK, self.dscale_R1[chunk])
        scales = self._own(chunk, x_RK) if self.scales is None else self._given(chunk)
        return self.kernel.requantized(x_RK, scales, self.dscale_R1[chunk], self.columns)

    def _in_one_pass(self, x_RK: Tensor) -> Loops | None:
        """Return the loops that make scales and elements together; None where there are none."""
        one_pass = self.fmt.arithmetic.one_pass and self.scales is None
        return loops_for(x_RK) if one_pass else None


def scale_fields(fmt: Format) -> list[Field]:
    """Return the fields of scales and zero points that blocks have."""
    return [f for f in fmt.fields[1:] if f.block != (WHOLE, WHOLE)]


def rows_on(x: Tensor, fmt: Format, fields: Mapping[str, Tensor], origin: Origin) -> Rows:
    """Describe how values ``x`` [..., K] are stored, with the scales that ``fields`` holds."""
    row_cuts, columns = cuts(x.shape, fmt, origin)
    dscale_R1 = row_scale(fields.get(fmt.fields[-1].name), x, fmt)
    scales = tuple(as_rows(fields[f.name]) for f in scale_fields(fmt))
    return Rows(
        fmt=fmt,
        dscale_R1=dscale_R1,
        columns=columns,
        scales=scales,
        block_R=block_index(x, row_cuts),
    )


def rows_of(
    x: Tensor, fmt: Format, dscale: Tensor | None, stat: Tensor | None, origin: Origin
) -> Rows:
    """Describe how the values ``x`` [..., K] are stored; find the scales as ``encode`` does."""
    dscale_R1 = row_scale(dscale, x, fmt)
    rows, columns = cuts(x.shape, fmt, origin)
    if stat is None and rows.block > 1:
        stat = block_stat(x, fmt, origin)
    if stat is None or fmt.stat_block is None:
        return Rows(fmt=fmt, dscale_R1=dscale_R1, columns=columns, scales=None, block_R=None)
    stat_RBP = flat_stat(stat, x, fmt, origin)
    scales = kernel_of(fmt).scale.fields(stat_RBP, dscale_R1, x.dtype)
    return Rows(
        fmt=fmt, dscale_R1=dscale_R1, columns=columns, scales=scales, block_R=block_index(x, rows)
    )


def flat_stat(stat: Tensor, x: Tensor, fmt: Format, origin: Origin) -> Tensor:
    """Flatten the statistic [..., N_b, K_b, P] of the blocks of ``x`` to fp32 [R_b, K_b, P]."""
    rows, columns = cuts(x.shape, fmt, origin)
    leading = (*x.shape[:-2], rows.count) if x.dim() > 1 else ()
    want = (*leading, columns.count, fmt.stat_parts)
    assert stat.shape == want, (fmt.name, tuple(x.shape), origin, tuple(stat.shape), want)
    return stat.float().reshape(prod(leading), *want[-2:])


def block_index(x: Tensor, rows: Cuts) -> Tensor | None:
    """Return the row of blocks of each row of ``x`` [..., N, K]; None where each has its own."""
    if rows.block == 1:
        return None
    return rows.index(x.shape[:-2].numel(), x.device)
