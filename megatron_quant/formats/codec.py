"""Encoding a weight into the fields that a format stores, and decoding those.

``w`` is one matrix [N, K] or a stack [E, N, K]. The scale of the whole (fused) tensor comes from
outside, because it may span more than the caller holds: ``dscale`` is fp32, [] for one scale or
[E, 1, 1] for one a matrix, multiply to decode, as ``tensor_scale`` makes it. With the scale given,
encoding commutes with slicing: a slice of rows, or of columns between groups, encodes to the slice
of the fields.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_quant.errors import FormatError
from megatron_quant.formats.amax import check_dtype
from megatron_quant.formats.chunks import as_rows, row_chunks
from megatron_quant.formats.kernels import kernel_of
from megatron_quant.formats.spec import WHOLE, Format

# Columns that no field may cut: an nvfp4 block, an int4 word.
_COLUMN_MULTIPLE = {"fp8": 1, "nvfp4": 16, "int4": 8}


def check_storable(x: Tensor, fmt: Format) -> None:
    """Raise FormatError where a tensor [..., K] cannot be stored in ``fmt``."""
    check_dtype(x)
    multiple = _COLUMN_MULTIPLE[fmt.name]
    if x.shape[-1] % multiple:
        raise FormatError(
            f"{fmt.name} needs the last dim to be a multiple of {multiple}, which shape "
            f"{list(x.shape)} has not; exclude this weight in the recipe or choose fp8 for it"
        )


def row_scale(dscale: Tensor | None, x: Tensor, fmt: Format) -> Tensor:
    """``dscale`` ([] or [E, 1, 1]) for each of the R rows of ``x`` [..., K]: fp32 [R, 1].

    Ones where the format has no scale per tensor.
    """
    leading = x.shape[:-1]
    if not fmt.tensor_scale:
        return torch.ones((), device=x.device).expand(leading.numel(), 1)
    assert dscale is not None, f"{fmt.name} needs the tensor's scale"
    if dscale.dim() == 0:
        return dscale.float().expand(leading.numel(), 1)
    assert dscale.shape == (leading[0], 1, 1) and len(leading) == 2, (dscale.shape, x.shape)
    return dscale.float().expand(*leading, 1).reshape(-1, 1)


@torch.no_grad()
def encode(w: Tensor, fmt: Format, dscale: Tensor | None) -> dict[str, Tensor]:
    """Field name -> stored tensor, in the order of ``fmt.fields``.

    w: bf16, fp16 or fp32, [N, K] or [E, N, K]; the fields of a stack have E as their first dim.
    dscale: see above; ignored (may be None) where ``fmt.tensor_scale`` is False. It is returned
        as the scalar field, in its own shape.
    Raises FormatError for another dtype or a K that the format cannot store. Values are not
    checked: whoever made the scale has refused NaN and Inf.
    """
    assert w.dim() in (2, 3), w.shape
    check_storable(w, fmt)
    w_RK, dscale_R1, kernel = as_rows(w), row_scale(dscale, w, fmt), kernel_of(fmt)
    per_row = [f for f in fmt.fields if f.block != (WHOLE, WHOLE)]
    stored = [w.new_empty(f.shape(*w_RK.shape), dtype=f.dtype) for f in per_row]
    for chunk in row_chunks(w_RK):
        for out, piece in zip(stored, kernel.encode(w_RK[chunk], dscale_R1[chunk]), strict=True):
            out[chunk] = piece
    leading = w.shape[:-1]
    fields = {f.name: t.view(*leading, t.shape[-1]) for f, t in zip(per_row, stored, strict=True)}
    if dscale is not None and fmt.tensor_scale:
        fields[fmt.fields[-1].name] = dscale
    return fields


@torch.no_grad()
def decode(fields: Mapping[str, Tensor], fmt: Format, dtype: torch.dtype) -> Tensor:
    """What the fields stand for: [N, K] or [E, N, K] in ``dtype``.

    Computed in fp32 and rounded to ``dtype`` once. ``fields`` are as ``encode`` returns them.
    """
    elements = fields[fmt.fields[0].name]
    w = elements.new_empty(
        *elements.shape[:-1], elements.shape[-1] * fmt.fields[0].block[1], dtype=dtype
    )
    w_RK, kernel = as_rows(w), kernel_of(fmt)
    dscale_R1 = row_scale(fields[fmt.fields[-1].name], w, fmt)
    per_row = [as_rows(fields[f.name]) for f in fmt.fields if f.block != (WHOLE, WHOLE)]
    for chunk in row_chunks(w_RK):
        w_RK[chunk] = kernel.decode(tuple(t[chunk] for t in per_row), dscale_R1[chunk])
    return w
