"""Make the values of one part from the parameter that its owner holds."""

from collections.abc import Iterator
from functools import lru_cache
from math import inf, isfinite

import torch

from megatron_quant.ckpt.dialects import INPUT_SCALE, PLAIN, SHAPE, WEIGHT_SCALE, Stored, cells
from megatron_quant.ckpt.plan import Piece, RankPart
from megatron_quant.ckpt.storage import TensorEntry
from megatron_quant.errors import CalibrationError, FormatError
from megatron_quant.formats import Field, Format, amax, encode, encode_on, get_format, tensor_scale
from megatron_quant.models import Box
from megatron_quant.native import WHOLE

Produced = tuple[TensorEntry, Box, torch.Tensor]
"""A file tensor, a box of it, and the box's values."""
Fields = dict[str, torch.Tensor]


def produce(
    part: RankPart,
    local: torch.Tensor,
    weight_amax: torch.Tensor | None = None,
    input_amax: torch.Tensor | None = None,
    block_stat: torch.Tensor | None = None,
    scales: Fields | None = None,
) -> Iterator[Produced]:
    """Yield the tensors of ``part``, from the live parameter ``local`` of its owner.

    local: the rank's shard of ``part.param``, bf16, fp16 or fp32 on any device.
    weight_amax: one element, the largest magnitude of the whole parameter (all that it fuses), if
        the format or the dialect has a tensor scale. input_amax: the same of its inputs, if their
        format has one.
    block_stat: statistics of the blocks that the part touches, as ``formats.block_stat`` makes
        them. None if they follow from the part alone, which takes that no shard cuts a block.
    scales: scales of all blocks that the part touches, and the tensor's, in the form of
        ``formats.grid``: the part is rounded onto them. None if they follow from amax and
        statistics.

    Raises FormatError for a weight or a scale that is not finite (or a scale that is 0), and
    CalibrationError for a statistic that is missing or not finite; both name the tensor.
    """
    w = part.region.take(local.detach())
    check_finite(part, w)
    yield from encoded(part, w, weight_amax, input_amax, block_stat, scales)


def check_finite(part: RankPart, w: torch.Tensor) -> None:
    """Raise FormatError unless the part's own values ``w`` are all finite."""
    if w.is_floating_point() and not isfinite(amax(w).item()):
        name = part.target.source.name
        raise FormatError(f"{name} has NaN or Inf; repair the source checkpoint")


def encoded(
    part: RankPart,
    w: torch.Tensor,
    weight_amax: torch.Tensor | None = None,
    input_amax: torch.Tensor | None = None,
    block_stat: torch.Tensor | None = None,
    scales: Fields | None = None,
) -> Iterator[Produced]:
    """Yield the tensors of the part's own values ``w``, which must be finite."""
    weights = part.target.scheme.weights
    if weights is None:
        yield _plain(part, w)
        return
    fields = _encoded(part, w, weight_amax, block_stat) if scales is None else _on(part, w, scales)
    fields |= _pseudo_fields(part, weight_amax, input_amax)
    for piece in part.pieces:
        field = _own_cells(part, piece.stored, fields[piece.stored.field])
        stored = piece.stored.to_disk(field).to(piece.entry.dtype)  # a kept scale's is narrower
        value = stored.reshape(piece.box.size)
        _check_scale(piece, value, weights)
        yield piece.entry, piece.box, value


def _plain(part: RankPart, w: torch.Tensor) -> Produced:
    (piece,) = part.pieces
    assert piece.stored.field == PLAIN
    value = w.to(piece.entry.dtype)
    if value.dtype != w.dtype and not torch.isfinite(amax(value)):
        raise FormatError(f"{piece.entry.name} exceeds {value.dtype}; choose --dtype bf16")
    return piece.entry, piece.box, value


def _encoded(
    part: RankPart,
    w_NK: torch.Tensor,
    weight_amax: torch.Tensor | None,
    block_stat: torch.Tensor | None,
) -> Fields:
    """Encode the part's weight; the scales cover every block that it touches."""
    source, weights = part.target.source, part.target.scheme.weights
    assert weights is not None
    dscale = None
    if weights.tensor_scale:
        stored = part.target.scheme.stored_of(weights.fields[-1].name)
        what = f"the weight {source.name}"
        dscale = _dscale(weight_amax, weights, what, stored).to(w_NK.device)
    _check_stat(part, weights, block_stat)
    start = part.region.start
    return encode(w_NK, weights, dscale, block_stat, (start[0], start[1]))


def _on(part: RankPart, w_NK: torch.Tensor, scales: Fields) -> Fields:
    """Encode the part's weight with these scales."""
    weights, start = part.target.scheme.weights, part.region.start
    assert weights is not None
    return encode_on(w_NK, weights, scales, (start[0], start[1]))


def _pseudo_fields(
    part: RankPart, weight_amax: torch.Tensor | None, input_amax: torch.Tensor | None
) -> Fields:
    source, scheme = part.target.source, part.target.scheme
    fields = {}
    if scheme.stored_of(SHAPE) is not None:
        fields[SHAPE] = torch.tensor(source.shape)
    if (stored := scheme.stored_of(WEIGHT_SCALE)) is not None:
        what = f"the weight {source.name}"
        fields[WEIGHT_SCALE] = _dscale(weight_amax, get_format("fp8"), what, stored)
    if scheme.inputs is not None and scheme.inputs.tensor_scale:
        stored, what = scheme.stored_of(INPUT_SCALE), f"the inputs of {source.module}"
        fields[INPUT_SCALE] = _dscale(input_amax, scheme.inputs, what, stored)
    return fields


def _check_stat(part: RankPart, fmt: Format, block_stat: torch.Tensor | None) -> None:
    """Raise CalibrationError if a block's statistic lies on several shards and is not merged."""
    block = fmt.stat_block
    if block_stat is None and block is not None and any(part.region.cut(block)):
        raise CalibrationError(
            f"{part.target.source.name}: shards cut its {fmt.name} blocks, and no calibration has"
            " merged their statistics; calibrate first"
        )


def _own_cells(part: RankPart, stored: Stored, value: torch.Tensor) -> torch.Tensor:
    """Pick the scales that the part writes from those of all blocks that it touches.

    It writes all of its elements: no edge splits what they are packed in.
    """
    fmt = part.target.scheme.weights
    assert fmt is not None
    field = next((f for f in fmt.fields[1:] if f.name == stored.field), None)
    if field is None or field.block == (WHOLE, WHOLE):
        return value
    shape, touched = part.target.source.shape, part.region.touched(field.block)
    own, counts = cells(stored, shape, part.src), _cells_each(stored, field, shape)
    return value[tuple(map(_slice, own.start, own.size, counts, touched))]


def _slice(start: int, size: int, count: int, touched: range) -> slice:
    """Return where stored elements from ``start`` on, ``count`` cells each, lie in ``touched``."""
    stop = min((start + size) * count, touched.stop)
    return slice(start * count - touched.start, stop - touched.start)


def _cells_each(stored: Stored, field: Field, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return, by dim, how many of the codec's cells one stored element holds."""
    extents = zip(stored.block, field.block, shape, strict=True)
    counts = [divmod(s or n, b or n) for s, b, n in extents]
    assert not any(remainder for _, remainder in counts), (stored, field)
    return tuple(count for count, _ in counts)


def _dscale(
    amax: torch.Tensor | None, fmt: Format, what: str, stored: Stored | None
) -> torch.Tensor:
    if amax is None:
        raise CalibrationError(f"{what} have no amax, which {fmt.name} needs; calibrate first")
    value = amax.item()
    if not isfinite(value):
        raise CalibrationError(f"the amax of {what} is {value}; look for NaN or Inf in the model")
    return _scale_of(value, fmt, stored)


@lru_cache(maxsize=16384)
def _scale_of(amax: float, fmt: Format, stored: Stored | None) -> torch.Tensor:
    """Return one scale for all experts that share it; do not change it.

    It is the value that readers of ``stored`` get, so codes are made with the scale that decodes
    them. If a dialect stores the inverse, one scale in six changes on the way there and back; the
    result of that way is taken instead. (For every fp32 mantissa a third inverse equals the first,
    so once is enough.)
    """
    scale = tensor_scale(torch.tensor(amax), fmt)
    return scale if stored is None else stored.from_disk(stored.to_disk(scale)).reshape(())


def _check_scale(piece: Piece, value: torch.Tensor, weights: Format) -> None:
    """Raise FormatError for a scale that cannot decode; every float but an element is a scale."""
    if piece.stored.field == weights.fields[0].name or not value.is_floating_point():
        return
    if piece.stored.signed:
        value = value.abs()
    low, high = (value.item(),) * 2 if value.numel() == 1 else _bounds(value)
    if not (low > 0 and 0 < high < inf):
        raise FormatError(
            f"{piece.entry.name} would hold scales from {low} to {high}, which {weights.name}"
            " cannot decode; exclude the weight in the recipe"
        )


def _bounds(value: torch.Tensor) -> tuple[float, float]:
    """Return the least and the largest element; if one is not positive or NaN, it shows."""
    if value.dtype == torch.float8_e4m3fn:  # codes order as their values do
        codes = torch.stack(torch.aminmax(value.view(torch.uint8)))
        low, high = codes.view(torch.float8_e4m3fn).float().tolist()
    else:
        low, high = torch.stack(torch.aminmax(value.float())).tolist()
    return low, high
