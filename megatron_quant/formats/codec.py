"""Encode a weight into the fields that a format stores, and decode those fields.

``w`` is one matrix [N, K], a stack [E, N, K], or a piece of such a logical tensor. A piece starts
at row and column ``origin`` of the logical tensor. Scales that span more than the piece come from
the caller:

- ``dscale`` is the scale of the whole (fused) tensor, fp32: [] for one, [E, 1, 1] for one a
  matrix. Decoding multiplies by it. ``tensor_scale`` makes it.
- ``stat`` is the statistic of the blocks that the piece touches. ``block_stat`` makes it of one
  piece; the maximum merges it with those of other pieces. A search may make it too.

With these given, encoding commutes with slicing: a piece encodes to the piece of the fields. The
cut may go anywhere but through one stored element of the first field.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_quant.formats.backends import loops_for
from megatron_quant.formats.blocks import (
    Rows,
    as_rows,
    check_storable,
    cuts,
    row_chunks,
    rows_of,
    rows_on,
    scale_fields,
)
from megatron_quant.formats.numbers import ScaleFields, kernel_of, squares
from megatron_quant.formats.spec import Format
from megatron_quant.native import Origin, library


@torch.no_grad()
def encode(
    w: Tensor,
    fmt: Format,
    dscale: Tensor | None,
    stat: Tensor | None = None,
    origin: Origin = (0, 0),
) -> dict[str, Tensor]:
    """Encode ``w`` and return field name -> stored tensor, in the order of ``fmt.fields``.

    Values are not checked: whoever made the scale has refused NaN and Inf.

    Args:
        w: bf16, fp16 or fp32, [N, K] or [E, N, K]. The fields of a stack begin with E.
        fmt: The format to store.
        dscale: Scale of the whole tensor, fp32 [] or [E, 1, 1]; returned as the scalar field.
            Ignored (may be None) where ``fmt.tensor_scale`` is False.
        stat: Statistic of every block that ``w`` touches; found from ``w`` alone where None.
            Ignored by formats without blocks.
        origin: Row and column of the logical tensor at which ``w`` starts.

    Raises:
        FormatError: For another dtype, a K that the format cannot store, or a cut through packed
            elements.
    """
    assert w.dim() in (2, 3), w.shape
    check_storable(w, fmt, stat, origin)
    w_RK, rows = as_rows(w), rows_of(w, fmt, dscale, stat, origin)
    elements, scales = encode_rows(w_RK, rows)
    fields = {fmt.fields[0].name: elements.view(*w.shape[:-1], elements.shape[-1])}
    return fields | named_scales(w, fmt, scales, dscale, origin)


def named_scales(
    w: Tensor, fmt: Format, scales: ScaleFields, dscale: Tensor | None, origin: Origin
) -> dict[str, Tensor]:
    """Return the scales of ``w`` by field name, in the order of ``fmt.fields``.

    Args:
        scales: Those of its blocks, as rows have them.
    """
    blocks = cuts(w.shape, fmt, origin)[0].count
    fields = {
        field.name: value.view(*w.shape[:-2], blocks, value.shape[-1])
        for field, value in zip(scale_fields(fmt), scales, strict=True)
    }
    if dscale is not None and fmt.tensor_scale:
        fields[fmt.fields[-1].name] = dscale
    return fields


def encode_rows(w_RK: Tensor, rows: Rows) -> tuple[Tensor, ScaleFields]:
    """Encode all rows: elements [R, K / packed], and the scale fields of all rows of blocks."""
    if loops_for(w_RK) is not None:  # cuts the rows by itself
        elements, own = rows.encode(slice(None), w_RK)
        return elements, own if rows.scales is None else rows.scales
    number, cols = w_RK.shape
    first = rows.fmt.fields[0]
    elements = w_RK.new_empty(number, cols // first.block[1], dtype=first.dtype)
    shape = (number, rows.columns.count)
    scales = rows.scales or tuple(
        w_RK.new_empty(shape, dtype=f.dtype) for f in scale_fields(rows.fmt)
    )
    for chunk in row_chunks(w_RK):
        elements[chunk], own = rows.encode(chunk, w_RK[chunk])
        if rows.scales is None:
            for whole, part in zip(scales, own, strict=True):
                whole[chunk] = part
    return elements, scales


@torch.no_grad()
def decode(
    fields: Mapping[str, Tensor], fmt: Format, dtype: torch.dtype, origin: Origin = (0, 0)
) -> Tensor:
    """Decode fields to [N, K] or [E, N, K]; compute in fp32 and round to ``dtype`` once.

    Args:
        fields: Stored tensors of one piece, as ``encode`` returns them.
        fmt: Their format.
        dtype: Dtype of the result.
        origin: Row and column of the logical tensor at which the piece starts.
    """
    elements = fields[fmt.fields[0].name]
    packed = kernel_of(fmt).element.packed
    w = elements.new_empty(*elements.shape[:-1], elements.shape[-1] * packed, dtype=dtype)
    rows = rows_on(w, fmt, fields, origin)
    w_RK, elements_RK = as_rows(w), as_rows(elements)
    if dtype == torch.float32 and library.reads(elements_RK):
        return rows.decode(slice(None), elements_RK).view(w.shape)
    for chunk in row_chunks(w_RK):
        w_RK[chunk] = rows.decode(chunk, elements_RK[chunk])
    return w


def lost(
    w: Tensor, fields: Mapping[str, Tensor], fmt: Format, origin: Origin = (0, 0)
) -> tuple[float, float]:
    """Return (sum of w^2, sum of (w - decoded)^2) in fp64; NaN and infinity pass through.

    Each difference is rounded to fp32 before it is squared.

    Args:
        w: bf16, fp16 or fp32, in the shape that ``decode`` gives.
        fields: Stored tensors, as ``decode`` takes them.
        fmt: Their format.
        origin: Row and column of the logical tensor at which the piece starts.
    """
    rows = rows_on(w, fmt, fields, origin)
    w_RK, elements_RK = as_rows(w), as_rows(fields[fmt.fields[0].name])
    if w.dtype == torch.float16:
        w_RK = w_RK.float()
    if library.reads(elements_RK):
        return rows.lost(w_RK, elements_RK)
    return lost_between(w, decode(fields, fmt, torch.float32, origin))


def lost_between(w: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Return the two sums of ``lost`` for fp32 values in the shape of ``w``, decoded already."""
    w_RK, decoded_RK = as_rows(w), as_rows(decoded)
    sums = (squares(w_RK[c].float(), decoded_RK[c]) for c in row_chunks(w_RK))
    own, difference = map(sum, zip(*sums, strict=True))
    return own, difference
