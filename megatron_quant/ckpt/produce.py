"""The values of one part, made from the parameter that its owner holds."""

from collections.abc import Iterator
from math import isfinite

import torch

from megatron_quant.ckpt.dialects.base import INPUT_SCALE, SHAPE
from megatron_quant.ckpt.files import TensorEntry
from megatron_quant.ckpt.pieces import PLAIN
from megatron_quant.ckpt.plan import Part, Piece
from megatron_quant.errors import CalibrationError, FormatError
from megatron_quant.formats.amax import amax, tensor_scale
from megatron_quant.formats.codec import encode
from megatron_quant.formats.spec import Format
from megatron_quant.models.spec import Box

Produced = tuple[TensorEntry, Box, torch.Tensor]
"""A tensor on disk, a box of it, and that box's values."""
Fields = dict[str, torch.Tensor]


def produce(
    part: Part,
    local: torch.Tensor,
    weight_amax: torch.Tensor | None = None,
    input_amax: torch.Tensor | None = None,
) -> Iterator[Produced]:
    """What ``part`` stores, from the live parameter ``local`` of the rank that owns it.

    local: the rank's shard of ``part.param``, bf16, fp16 or fp32 on any device.
    weight_amax: one element, the largest magnitude of the whole parameter (all that it fuses),
        where the format has a tensor scale. input_amax: the same of its inputs, where those are
        quantized.

    Raises FormatError for a weight or a scale that is not finite (or a scale that is 0), and
    CalibrationError for an amax that is missing or not finite; both name the tensor.
    """
    w = local.detach()[part.copy.dst.index]
    name = part.target.source.name
    if not torch.isfinite(amax(w)):
        raise FormatError(f"{name} has NaN or Inf; repair the source checkpoint")
    weights = part.target.scheme.weights
    if weights is None:
        yield _plain(part, w)
        return
    fields = _fields(part, w, weight_amax, input_amax)
    for piece in part.pieces:
        value = piece.stored.to_disk(fields[piece.stored.field]).reshape(piece.box.size)
        _check_scale(piece, value, weights)
        yield piece.entry, piece.box, value


def _plain(part: Part, w: torch.Tensor) -> Produced:
    (piece,) = part.pieces
    assert piece.stored.field == PLAIN
    value = w.to(piece.entry.dtype)
    if not torch.isfinite(amax(value)):
        raise FormatError(f"{piece.entry.name} exceeds {value.dtype}; choose --dtype bfloat16")
    return piece.entry, piece.box, value


def _fields(
    part: Part,
    w_NK: torch.Tensor,
    weight_amax: torch.Tensor | None,
    input_amax: torch.Tensor | None,
) -> Fields:
    source, scheme = part.target.source, part.target.scheme
    assert scheme.weights is not None
    dscale = None
    if scheme.weights.tensor_scale:
        dscale = _dscale(weight_amax, scheme.weights, f"the weight {source.name}")
    fields = encode(w_NK, scheme.weights, None if dscale is None else dscale.to(w_NK.device))
    fields[SHAPE] = torch.tensor(source.shape)
    if scheme.inputs is not None:
        fields[INPUT_SCALE] = _dscale(input_amax, scheme.inputs, f"the inputs of {source.module}")
    return fields


def _dscale(amax: torch.Tensor | None, fmt: Format, what: str) -> torch.Tensor:
    if amax is None:
        raise CalibrationError(f"{what} have no amax, which {fmt.name} needs; calibrate first")
    if not isfinite(amax.item()):
        raise CalibrationError(f"the amax of {what} is {amax.item()}; look for NaN in the model")
    return tensor_scale(amax.detach().reshape(()), fmt)


def _check_scale(piece: Piece, value: torch.Tensor, weights: Format) -> None:
    """Whatever is a float and no element is a scale."""
    if piece.stored.field == weights.fields[0].name or not value.is_floating_point():
        return
    low, high = (bound.item() for bound in torch.aminmax(value.float()))
    if not (low > 0 and isfinite(high)):
        raise FormatError(
            f"{piece.entry.name} would hold scales from {low} to {high}, which {weights.name}"
            " cannot decode; exclude the weight in the recipe"
        )
