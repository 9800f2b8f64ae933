"""Count what rounding the weights behind a place costs their outputs, with factors on them.

Scales are searched as the export's are, but for fewer multiples. Errors are counted in integers, so
that their sums do not depend on an order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.formats import (
    MSE_MULTIPLIERS,
    Format,
    SearchedPiece,
    amax,
    block_stat,
    choose,
    errors,
    fake_quant,
    tensor_scale,
)
from megatron_quant.recipes import Decision
from megatron_quant.rounding import importance

_TRIED = MSE_MULTIPLIERS[::2]
_UNITS, _MOST = 2.0**30, 2.0**40


@dataclass(frozen=True)
class Samples:
    """Rows of E tensors that are quantized alike.

    Attributes:
        w_ERK: Whole rows, in the dtype of the run.
        squares_EK: Sums of squares of the tensors' inputs, fp32.
        decision: How they are quantized.
    """

    w_ERK: Tensor
    squares_EK: Tensor
    decision: Decision

    @property
    def fmt(self) -> Format:
        """Return the format of the weights."""
        assert self.decision.weights is not None
        return self.decision.weights


def stacked(rows: Iterable[tuple[Tensor, Tensor, Decision]]) -> list[Samples]:
    """Put tensors together that are alike; each comes with squares [K] and its decision."""
    alike: dict[tuple[object, ...], list[tuple[Tensor, Tensor, Decision]]] = {}
    for w_RK, squares_K, decision in rows:
        kind = (decision.treatment, tuple(w_RK.shape))
        alike.setdefault(kind, []).append((w_RK, squares_K, decision))
    found = []
    for members in alike.values():
        weights, squares, decisions = zip(*members, strict=True)
        found.append(Samples(torch.stack(weights), torch.stack(squares), decisions[0]))
    return found


@torch.no_grad()
def rounding_error(factors_K: Tensor, samples: Sequence[Samples], name: str) -> int:
    """Count sum (w - w')^2 x^2 in units that depend on the samples alone.

    Args:
        factors_K: Factors of the columns, fp32.
        samples: The rows, without factors.
        name: Name of the place, for messages.
    """
    scaled = [(s.w_ERK.float() * factors_K).to(s.w_ERK.dtype) for s in samples]
    largest: dict[Format, Tensor] = {}
    for one, w_ERK in zip(samples, scaled, strict=True):
        found = amax(w_ERK)
        largest[one.fmt] = torch.maximum(largest.get(one.fmt, found), found)
    unit, total = max(map(_unit, samples)), 0
    for one, w_ERK in zip(samples, scaled, strict=True):
        dscale = tensor_scale(largest[one.fmt], one.fmt) if one.fmt.tensor_scale else None
        stat = _searched(one, w_ERK, dscale, factors_K, name)
        stored = fake_quant(w_ERK, one.fmt, dscale, stat).float()
        lost = stored.div_(factors_K).sub_(one.w_ERK.float())
        weights = one.squares_EK.unsqueeze(1) * (_UNITS / unit)
        counted = lost.square_().mul_(weights).clamp_(max=_MOST).round_()
        total += int(counted.to(torch.int64).sum())
    return total


def _searched(
    samples: Samples, w_ERK: Tensor, dscale: Tensor | None, factors_K: Tensor, name: str
) -> Tensor | None:
    """Return the statistics of blocks that a search finds; None where none is made."""
    fmt = samples.fmt
    if not samples.decision.searches_blocks:
        return None
    weight = None
    if samples.decision.weighted:
        weight = importance(samples.squares_EK / factors_K.square(), fmt, name)
    stat = block_stat(w_ERK, fmt)
    sums = errors(w_ERK, fmt, dscale, stat, _TRIED, SearchedPiece((0, 0), weight))
    return stat * choose(sums, _TRIED).unsqueeze(-1)


def _unit(samples: Samples) -> float:
    """Return a bound on an element's weighted square, a power of two."""
    largest = amax(samples.w_ERK).double() ** 2 * samples.squares_EK.max().double()
    return 2.0 ** int(torch.frexp(largest.clamp(2.0**-100, 2.0**100)).exponent)
