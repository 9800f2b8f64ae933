"""Factors of second moments, kept while parts of the same weight, or of fused ones, are rounded."""

from dataclasses import dataclass, field

import torch

from megatron_quant.recipes import Decision
from megatron_quant.rounding import (
    Correction,
    Feedback,
    GptqSettings,
    correction,
    factored,
    serve_,
)
from megatron_quant.streaming.input_sums import InputSums

_KEPT = 2
"""A file has o_proj between k_proj and the q_proj and v_proj that share its inputs."""


@dataclass(frozen=True)
class Factored:
    """The consequences of a second moment of inputs, as they are served.

    Attributes:
        feedback: Its factors.
        squares_K: Its diagonal, fp32.
        correction: What weights give back for codes of the inputs; None without.
    """

    feedback: Feedback
    squares_K: torch.Tensor
    correction: Correction | None = None


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
            moment_KK, corrected = sums.moment(slot), None
            if decision.serves_codes:
                lost_KK, moment_KK = sums.lost(decision), moment_KK.clone()  # a file's is not ours
                serve_(moment_KK, lost_KK)
                corrected = correction(moment_KK, lost_KK, slot.name)
            how = factored(moment_KK, fmt, GptqSettings(decision.damp, [slot.name]))
            found = Factored(how, moment_KK.diagonal().clone(), corrected)
        self._kept[slot.name] = found
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        return found
