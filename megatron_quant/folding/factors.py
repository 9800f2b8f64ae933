"""Choose the factors of a place.

Input channel k is divided by s_k, and column k of the weights multiplied by it. AWQ (Lin et al.,
2023) takes s = x^alpha, x an average magnitude of the channel, and tries alphas. SmoothQuant (Xiao
et al., 2022) takes s = peak^alpha / w^(1 - alpha) of the largest magnitudes. Here x is the root
mean square, from the squares that imatrix measures, and an alpha's error is that of the outputs
with independent channels: sum (w - w')^2 x^2. It is counted on rows of whole weights, so the choice
is the same at every layout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_quant.errors import CalibrationError
from megatron_quant.folding.fold import Fold
from megatron_quant.folding.places import Place
from megatron_quant.folding.rounding_error import Samples, rounding_error, stacked
from megatron_quant.recipes import Decision, Slot

STEPS = 20
"""Alphas that are tried: 0, 1/20, ..., 1."""
SMOOTHING = 0.5
"""Alpha of smoothquant where a recipe gives none."""
_FLOOR = 0.01
"""Part of the mean square that every channel gets on top: silent channels count a little."""
_LEAST = 1e-5
"""Least peak of a channel, of the largest."""
_ELEMENTS, _OF_EXPERT = 1 << 20, 1 << 16
"""About how many elements of the weights are looked at for a place, and for one of an expert."""


class Evidence(Protocol):
    """The statistics, and values of weights in the dtype of the run, by which factors are found."""

    def squares(self, slot: Slot) -> Tensor:
        """Return the sums of squares of a slot's inputs: fp32 [K]."""
        ...

    def peaks(self, slot: Slot) -> Tensor:
        """Return the largest magnitudes of their channels: fp32 [K]."""
        ...

    def norm(self, place: Place) -> Tensor:
        """Return the stored weight of a norm: [K]."""
        ...

    def rows(self, place: Place, tensor: str) -> Tensor:
        """Return the rows :func:`sampled_rows` of a tensor behind the place, whole: [R, K]."""
        ...

    def column_amax(self, place: Place, tensor: str) -> Tensor:
        """Return the largest magnitude of each column of such a tensor: fp32 [K]."""
        ...


def fold_place(place: Place, evidence: Evidence) -> Fold:
    """Find the factors of a place.

    Raises:
        CalibrationError: For statistics that are missing or not finite.
    """
    before = evidence.norm(place) if place.norm else None
    slots = [reader.decision.slot for reader in place.readers]
    if place.algorithm == "smoothquant":
        peaks_K = _checked(place, pooled(place, [evidence.peaks(slot) for slot in slots], True))
        columns = [evidence.column_amax(place, t) for r in place.readers for t in r.tensors]
        return _fold(place, smoothing_factors(place, peaks_K, pooled(place, columns, True), before))
    squares = [evidence.squares(slot) for slot in slots]
    squares_K = _checked(place, pooled(place, squares))
    samples = [] if place.alpha is not None else stacked(_rows(place, evidence, squares))
    return _fold(place, searched_factors(place, squares_K, samples, before))


def _rows(
    place: Place, evidence: Evidence, squares: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Decision]]:
    for reader, squares_K in zip(place.readers, squares, strict=True):
        for tensor in reader.tensors:
            yield evidence.rows(place, tensor), squares_K, reader.decision


def sampled_rows(place: Place, tensor: str) -> Tensor:
    """Return the numbers of the rows of ``tensor`` on which alphas are tried, in order."""
    rows, cols = place.after[tensor]
    (fmt,) = {r.decision.weights for r in place.readers if tensor in r.tensors}
    assert fmt is not None
    block = (fmt.stat_block or (1, 0))[0] or 1
    tensors = sum(len(r.tensors) for r in place.readers)
    most = (_ELEMENTS if place.expert is None else _OF_EXPERT) // (cols * tensors)
    blocks, wanted = -(-rows // block), max(most // block, 1)
    chosen = torch.arange(min(blocks, wanted)) * blocks // min(blocks, wanted)
    every = (chosen.unsqueeze(1) * block + torch.arange(block)).flatten()
    return every[every < rows]


def pooled(place: Place, statistics: Sequence[Tensor], largest: bool = False) -> Tensor:
    """Return the statistic [K] of a place's outputs, from those of its readers' inputs.

    Args:
        place: The place.
        statistics: fp32, one a reader: sums of squares, or largest magnitudes.
        largest: Whether they are magnitudes, which merge by their maximum.
    """
    stack = torch.stack([s.double() for s in statistics])
    found = stack.amax(0) if largest else _added(stack)
    groups, repeats = place.heads
    heads = found.view(groups, repeats, -1)
    return (heads.amax(1) if largest else _added(heads.transpose(0, 1))).flatten()


def _added(stack: Tensor) -> Tensor:
    """Add along the first dim, in order."""
    total = stack[0].clone()
    for one in stack[1:]:
        total += one
    return total


def spread(place: Place, factors_K: Tensor) -> Tensor:
    """Return the factor of each column that reads one of the place's outputs, contiguous."""
    groups, repeats = place.heads
    return factors_K.view(groups, 1, -1).repeat(1, repeats, 1).flatten()


def _checked(place: Place, statistic_K: Tensor) -> Tensor:
    """Return a statistic; raise CalibrationError where it is not finite."""
    if not bool(statistic_K.isfinite().all()):
        raise CalibrationError(
            f"what was measured behind {place.name} is not finite: an activation is NaN, infinite "
            "or very large on the calibration data; exclude the layer or check the model"
        )
    return statistic_K


@dataclass(frozen=True)
class Factors:
    """The factors of a place.

    Attributes:
        factors_K: fp32 [K].
        weight_K: What a norm stores now, in its dtype; None for a linear.
    """

    factors_K: Tensor
    weight_K: Tensor | None = None


def searched_factors(
    place: Place, squares_K: Tensor, samples: Sequence[Samples], before: Tensor | None
) -> Factors:
    """Return awq's factors of the alpha with the least error, or of the place's own alpha.

    Args:
        place: The place.
        squares_K: Pooled sums of squares.
        samples: Rows of the weights; empty where the place has an alpha.
        before: The norm's stored weight [K]; None for a linear.
    """
    x_K = (squares_K / squares_K.mean().clamp(min=1e-300) + _FLOOR).sqrt()
    if place.alpha is not None:
        return _realized(place, _centred(x_K**place.alpha), before)
    steps = range(STEPS + 1)
    tried = [_realized(place, _centred(x_K ** (step / STEPS)), before) for step in steps]
    errors = [
        rounding_error(spread(place, found.factors_K), samples, place.name) for found in tried
    ]
    return tried[errors.index(min(errors))]


def smoothing_factors(
    place: Place, peaks_K: Tensor, weights_K: Tensor, before: Tensor | None
) -> Factors:
    """Return smoothquant's factors.

    Args:
        place: The place.
        peaks_K: Pooled largest magnitudes of its outputs.
        weights_K: Largest magnitudes of the columns that read each output.
        before: The norm's stored weight [K]; None for a linear.
    """
    alpha = SMOOTHING if place.alpha is None else place.alpha
    peaks, weights = (v.double() for v in (peaks_K, weights_K))
    peaks, weights = (v.clamp(min=max(_LEAST * v.max().item(), 1e-30)) for v in (peaks, weights))
    return _realized(place, _centred(peaks**alpha / weights ** (1 - alpha)), before)


def _centred(factors_K: Tensor) -> Tensor:
    """Return factors whose largest and smallest are inverse to one another, in bf16's digits.

    The few digits hide how a processor rounds powers.
    """
    middle = (factors_K.max() * factors_K.min()).sqrt()
    return (factors_K / middle).to(torch.bfloat16).double()


def _realized(place: Place, factors_K: Tensor, before: Tensor | None) -> Factors:
    """Return the factors that a norm can store.

    A norm's quotient is rounded to its dtype. So the factor is the old weight over the new one: the
    product stays what it was. Channels that are 0, or would be, keep their weight.
    """
    if before is None:
        return Factors(factors_K.float())
    old = before.double() + place.offset
    new = ((old / factors_K) - place.offset).to(before.dtype)
    now = new.double() + place.offset
    ratio = (old / now).float()
    change = (ratio > 0) & ratio.isfinite()  # false for 0 / 0 too
    return Factors(torch.where(change, ratio, 1.0), torch.where(change, new, before))


def _fold(place: Place, found: Factors) -> Fold:
    """Return the fold of one place."""
    factors, columns = f"{place.name}.factors", f"{place.name}.factors"
    vectors = {factors: found.factors_K}
    if place.heads[1] > 1:
        columns = f"{place.name}.columns"
        vectors[columns] = spread(place, found.factors_K)
    divided, values = place.before, dict[str, str]()
    if found.weight_K is not None:
        weight, *divided_too = place.before
        values, divided = {weight: f"{place.name}.values"}, tuple(divided_too)
        vectors[f"{place.name}.values"] = found.weight_K.float()
    return Fold(
        vectors,
        values=values,
        rows=dict.fromkeys(divided, factors),
        columns=dict.fromkeys(place.after, columns),
    )
