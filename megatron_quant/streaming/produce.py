"""Produce each part that an export asks for, from the source checkpoint alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from megatron_quant.ckpt.plan import RankPart
from megatron_quant.ckpt.read import KeptScales
from megatron_quant.ckpt.write import Produced, check_finite, encoded, produce_cache_scale
from megatron_quant.formats import fake_quant, scales_of, tensor_scale
from megatron_quant.models import Role
from megatron_quant.recipes import CAST_AMAX, Decision, QuantPlan
from megatron_quant.rounding import Piece, gptq_pieces
from megatron_quant.streaming.factors import Factors
from megatron_quant.streaming.input_sums import InputSums
from megatron_quant.streaming.part_source import PartSource
from megatron_quant.streaming.search import searched_stat


@dataclass(frozen=True, kw_only=True)
class Producer:
    """A producer that reads, encodes and forgets each part.

    Attributes:
        source: The source checkpoint.
        quant: The resolved recipe.
        weight_amax: Amax by slot, fp32 [], if needed.
        input_amax: Amax of inputs by slot, fp32 [], if needed.
        cache_amax: Amax by cache slot; empty where keys and values are cast, whose scale is 1.
        kept: Scales that the weights keep; None if they get their own.
        sums: Squares and products of inputs, if algorithms need them.
    """

    source: PartSource
    quant: QuantPlan
    weight_amax: Mapping[str, torch.Tensor]
    input_amax: Mapping[str, torch.Tensor] = field(default_factory=dict)
    cache_amax: Mapping[str, float] = field(default_factory=dict)
    kept: KeptScales | None = None
    sums: InputSums | None = None
    _factors: Factors = field(default_factory=Factors)

    def __call__(self, part: RankPart) -> Iterator[Produced]:
        """Yield the tensors of ``part``."""
        if part.param.role is Role.CACHE:
            largest = self.cache_amax.get(part.param.name, CAST_AMAX)
            return produce_cache_scale(part, torch.tensor(largest))
        w, name = self.source.read(part), part.param.name
        weight_amax, decision = self.weight_amax.get(name), self.quant.by_name[name]
        if weight_amax is None:  # otherwise finding the amax has checked every weight
            check_finite(part, w)
        if decision.rounds:
            w, grid = self._rounded(w, decision, weight_amax, part.src.start)
            return encoded(part, w, weight_amax, self.input_amax.get(name), None, grid)
        squares_K = None
        if decision.weighted:
            assert self.sums is not None, "measured or loaded before"
            squares_K = self.sums.squares(decision.slot)
        stat = searched_stat(w, decision, weight_amax, part.src.start, squares_K)
        scales: dict[str, torch.Tensor] | None = None
        if self.kept is not None and self.kept.keeps(decision):
            scales = self.kept.read(name, part.target.source.module, part.region)
        return encoded(part, w, weight_amax, self.input_amax.get(name), stat, scales)

    def values(self, name: str, w_NK: torch.Tensor) -> torch.Tensor:
        """Return the values that a slot's whole tensor ``w_NK`` has once it is quantized."""
        decision, amax = self.quant.by_name[name], self.weight_amax.get(name)
        fmt = decision.weights
        if fmt is None:
            return w_NK
        if decision.rounds:
            return self._rounded(w_NK, decision, amax, (0, 0))[0]
        squares_K = None
        if decision.weighted:
            assert self.sums is not None, "measured before"
            squares_K = self.sums.squares(decision.slot)
        stat = searched_stat(w_NK, decision, amax, (0, 0), squares_K)
        dscale = tensor_scale(amax, fmt) if amax is not None and fmt.tensor_scale else None
        return fake_quant(w_NK, fmt, dscale, stat)

    def _rounded(
        self,
        w_NK: torch.Tensor,
        decision: Decision,
        amax: torch.Tensor | None,
        start: tuple[int, ...],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return whole rows as gptq rounds them, and the scales that they lie on."""
        fmt, origin = decision.weights, (start[0], start[1])
        assert fmt is not None and self.sums is not None, "measured or loaded before"
        found = self._factors.of(decision, self.sums)
        if found.correction is not None:
            w_NK = found.correction.apply(w_NK)
        squares_K = found.squares_K if decision.weighted else None
        stat = searched_stat(w_NK, decision, amax, start, squares_K)
        dscale = tensor_scale(amax, fmt) if amax is not None and fmt.tensor_scale else None
        scales = scales_of(w_NK, fmt, dscale, stat, origin)
        (rounded,) = gptq_pieces([Piece(w_NK, scales, origin)], fmt, found.feedback)
        return rounded.w.to(w_NK.dtype), scales


def unscaled(source: PartSource, quant: QuantPlan) -> Producer:
    """Return a producer of parts that need no amax, such as those of draft layers."""
    return Producer(source=source, quant=quant, weight_amax={})
