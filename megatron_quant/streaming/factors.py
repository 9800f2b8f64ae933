"""Factors of second moments, kept while parts of the same weight, or of fused ones, are rounded."""

from dataclasses import dataclass, field

import torch

from megatron_quant.recipes import Decision
from megatron_quant.rounding import Feedback, GptqSettings, factored
from megatron_quant.streaming.input_sums import InputSums

_KEPT = 2
"""A file has o_proj between k_proj and the q_proj and v_proj that share its inputs."""


@dataclass(frozen=True)
class Factored:
    """A second moment's factors, and its diagonal: fp32 [K]."""

    feedback: Feedback
    squares_K: torch.Tensor


@dataclass
class Factors:
    """The factors of the last few slots."""

    _kept: dict[str, Factored] = field(default_factory=dict)

    def of(self, decision: Decision, sums: InputSums) -> Factored:
        """Return those of a slot.

        Raises:
            CalibrationError: For a second moment that is not finite or has no Cholesky factor.
        """
        slot, fmt = decision.slot, decision.weights
        assert fmt is not None
        found = self._kept.pop(slot.name, None)
        if found is None:
            moment_KK = sums.moment(slot)
            how = factored(moment_KK, fmt, GptqSettings(decision.damp, [slot.name]))
            found = Factored(how, moment_KK.diagonal().clone())
        self._kept[slot.name] = found
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return found
