"""Choose scales by the error that they leave.

A search multiplies a statistic: that of each block (``block_stat``), or the amax of a whole tensor
where a format has no blocks. Its result is a statistic again, so encoding knows nothing of
searches. Errors are integers. Their sums are exact and equal in every order and on every layout,
and so is the choice; rounded sums could break a tie differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.formats.blocks import (
    Rows,
    as_rows,
    block_index,
    check_storable,
    cuts,
    flat_stat,
    row_chunks,
    row_scale,
    rows_of,
)
from megatron_quant.formats.numbers import check_dtype, tensor_scale
from megatron_quant.formats.spec import Format
from megatron_quant.native import Cuts, Origin

FOUR_OVER_SIX = (1.0, 1.5)
"""For nvfp4: a block's largest value becomes the code of 6 or that of 4."""
FOUR_OVER_SIX_RANGE = 448 / 256
"""Factor on the tensor's amax then, which keeps every block scale in E4M3's range."""
MSE_MULTIPLIERS = (
    1.0,
    *(n / 20 for n in range(19, 7, -1)),
    *(n / 20 for n in range(21, 33)),
)
"""0.4 to 1.6 in steps of 0.05. A multiple below 1 clips outliers. One above 1 moves a block of
floats to another part of their uneven grid, and a rounded scale to its neighbours."""
MULTIPLIERS = {"mse": MSE_MULTIPLIERS, "four_over_six": FOUR_OVER_SIX}
"""Algorithm of a recipe -> the multiples of a block's statistic that it tries."""

_MOST = 2.0
_UNITS = 2.0**32
"""Units of squared errors in amax^2, amax rounded up to a power of two."""


@dataclass(frozen=True)
class SearchedPiece:
    """A piece of a tensor whose scales are searched.

    Attributes:
        origin: Row and column of the logical tensor at which the piece starts.
        weight: Factor on the errors of each column from 0 to 1, fp32 [K], or [E, K] for a stack;
            equal ones where None.
    """

    origin: Origin = (0, 0)
    weight: Tensor | None = None


_WHOLE = SearchedPiece()


@torch.no_grad()
def errors(
    w: Tensor,
    fmt: Format,
    dscale: Tensor | None,
    stat: Tensor,
    multipliers: Sequence[float],
    piece: SearchedPiece = _WHOLE,
) -> Tensor:
    """Sum the squared dequantization errors for each multiple of ``stat``, as integers.

    Args:
        w: Finite bf16, fp16 or fp32 [N, K] or [E, N, K], the ``piece`` of its tensor.
        fmt: The format that stores ``w``.
        dscale: Scale of the tensor, as ``encode`` takes it; None where ``fmt`` has no blocks.
        stat: Merged statistic [..., N_b, K_b, P] of ``block_stat``. Where ``fmt`` has no blocks,
            the amax of the tensor, [] or [E, 1, 1].
        multipliers: The M multiples of ``stat`` to try.
        piece: Where ``w`` starts, and the factors on the errors of its columns.

    Returns:
        int64 [M, ..., N_b, K_b], or [M, *stat.shape] without blocks. Each element's squared error
        is divided by the square of the statistic's next power of two, weighted, rounded to a
        multiple of 2^-32, and summed. Pieces of one block with equal statistics merge by SUM,
        exactly.

    Raises:
        FormatError: Where ``encode`` raises it.
    """
    origin, weight = piece.origin, piece.weight
    check_storable(w, fmt, stat, origin)
    tried = [_tried(w, fmt, dscale, stat, m, origin) for m in multipliers]
    rows, columns = cuts(w.shape, fmt, origin)
    w_RK = as_rows(w)
    index_R = block_index(w, rows)
    scale_RB = _inverse_unit(_amax_RB(w, fmt, stat, origin))
    sums = w_RK.new_empty(len(tried), w_RK.shape[0], columns.count, dtype=torch.int64)
    for chunk in row_chunks(w_RK):
        x_RK = w_RK[chunk].float()
        inverse = scale_RB[chunk if index_R is None else index_R[chunk]]
        weight_RBb = None if weight is None else columns.split(_of_rows(weight, w, chunk))
        for m, how in enumerate(tried):
            error_RK = x_RK - _values(how, chunk, w_RK[chunk])
            sums[m, chunk] = _counted(columns.split(error_RK), inverse, weight_RBb)
    return _by_block(sums, w, fmt, stat, rows)


def _tried(
    w: Tensor, fmt: Format, dscale: Tensor | None, stat: Tensor, multiplier: float, origin: Origin
) -> Rows:
    if fmt.stat_block is None:
        return rows_of(w, fmt, tensor_scale(stat * multiplier, fmt), None, origin)
    return rows_of(w, fmt, dscale, stat * multiplier, origin)


def _values(how: Rows, chunk: slice, x_RK: Tensor) -> Tensor:
    stored, scales = how.encode(chunk, x_RK)
    return how.kernel.values(stored, scales, how.dscale_R1[chunk], how.columns)


def _amax_RB(w: Tensor, fmt: Format, stat: Tensor, origin: Origin) -> Tensor:
    """Return a bound of |w| for each row of blocks, fp32."""
    if fmt.stat_block is None:
        return row_scale(stat, w, fmt)
    return flat_stat(stat, w, fmt, origin).amax(-1)


def _inverse_unit(amax: Tensor) -> Tensor:
    """Return 2^-e, where 2^e is the power of two above amax; e between -126 and 126."""
    exponent = torch.frexp(amax).exponent.clamp_(-126, 126)
    return ((127 - exponent) << 23).view(torch.float32)


def _of_rows(weight: Tensor, w: Tensor, chunk: slice) -> Tensor:
    """Return the weights of the rows ``chunk`` of ``w``: [1, K] where all rows share one."""
    if weight.dim() == 1:
        return weight.unsqueeze(0)
    row_R = torch.arange(chunk.start, chunk.stop, device=w.device)
    return weight[row_R.div(w.shape[-2], rounding_mode="floor")]


def _counted(error_RBb: Tensor, inverse_RB: Tensor, weight_RBb: Tensor | None) -> Tensor:
    """Count squared errors in units, each rounded, and sum over the last dim: int64 [R, B]."""
    relative = error_RBb.mul_(inverse_RB.unsqueeze(-1)).square_().clamp_(max=_MOST)
    if weight_RBb is not None:
        relative.mul_(weight_RBb)
    units = relative.mul_(_UNITS).round_()
    # fp64 adds up 2^20 integers below 2^33 without rounding.
    return units.sum(-1, dtype=torch.float64).to(torch.int64)


def _by_block(sums_MRB: Tensor, w: Tensor, fmt: Format, stat: Tensor, rows: Cuts) -> Tensor:
    tried, _, blocks = sums_MRB.shape
    if fmt.stat_block is None:
        by_slice: Tensor = sums_MRB.unflatten(1, (stat.numel(), -1))
        return by_slice.sum((2, 3)).view(tried, *stat.shape)
    if rows.block > 1:
        matrices = tried * w.shape[:-2].numel()
        sums_MRB = rows.gather(sums_MRB.view(matrices, rows.length, blocks)).sum(2)
    return sums_MRB.view(tried, *w.shape[:-2], rows.count, blocks)


def choose(errors: Tensor, multipliers: Sequence[float]) -> Tensor:
    """Return the multiplier of the least error, the earliest of equal ones: [M, ...] -> fp32 [...].

    Multipliers begin with 1, so a block that gains nothing keeps its statistic. Apply the result as
    ``stat * chosen.unsqueeze(-1)`` for blocks, and as ``amax * chosen`` for tensors.
    """
    return torch.tensor(multipliers, device=errors.device)[errors.argmin(0)]


@torch.no_grad()
def histogram(x: Tensor, bins: int, limit: Tensor) -> Tensor:
    """Count the |x| in each of ``bins`` equal parts of [0, limit]: int64 [bins].

    Histograms merge by SUM.

    Args:
        x: bf16, fp16 or fp32 of any shape.
        bins: Number of parts.
        limit: Upper end, fp32 [], equal on all ranks. The last bin also counts values above it and
            NaN.
    """
    check_dtype(x)
    per_unit = torch.where(limit > 0, bins / limit, 0.0)
    counts = torch.zeros(bins, dtype=torch.int64, device=x.device)
    x_RK = as_rows(x.view(1) if x.dim() == 0 else x)
    for chunk in row_chunks(x_RK):
        place = x_RK[chunk].float().abs().mul_(per_unit).nan_to_num_(bins).clamp_(max=bins - 1)
        counts += torch.bincount(place.view(-1).to(torch.int64), minlength=bins)
    return counts


def percentile_amax(counts: Tensor, limit: Tensor, q: float) -> Tensor:
    """Return the least bin edge that ``q`` percent of the counted values do not exceed: fp32 [...].

    Args:
        counts: Merged int64 [..., bins] of ``histogram``. Where nothing was counted, the result
            is 0.
        limit: Upper end of the last bin, fp32 [...].
        q: Percentage, above 0, at most 100. 100 gives the end of the last bin that has a value.
    """
    assert 0 < q <= 100, q
    bins, total = counts.shape[-1], counts.sum(-1)
    needed = (total.double() * (q / 100)).ceil().clamp(min=1)
    edge = (counts.cumsum(-1) < needed.unsqueeze(-1)).sum(-1) + 1
    return torch.where(total > 0, limit * (edge.clamp(max=bins).float() / bins), 0.0)
