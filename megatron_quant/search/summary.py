"""Describe a finished search as plain values, which JSON files hold and reports draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_quant.search.problem import Place, Problem

VERSION = 1
UNITS = {
    "gradient": "sum over tokens of (gradient of the loss x change of the output)^2",
    "kl_div": "sum over tokens of the KL divergence from the unquantized model, in nats",
}
"""Method -> what its scores are."""
_POINTS = 25


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Say what was chosen, among what.

    Attributes:
        problem: The places.
        scores: Score of each option of each place, by the place's name.
        chosen: Option of each place.
        method: One of :data:`METHODS`.
        cost: One of :data:`COSTS`.
        bound: Most bits a weight that were asked for.
    """

    problem: Problem
    scores: Mapping[str, Sequence[float]]
    chosen: tuple[int, ...]
    method: str
    cost: str
    bound: float

    @property
    def bits(self) -> float:
        """Return the bits a weight that it takes."""
        return self.problem.bits(self.chosen, self.cost)

    def document(self) -> dict[str, Any]:
        """Return it as JSON, in the form that docs/auto_quantize.md describes."""
        problem, scores = self.problem, self.scores
        frontier = problem.frontier(scores, self.cost, _POINTS)
        return {
            "version": VERSION,
            "method": self.method,
            "unit": UNITS[self.method],
            "cost": self.cost,
            "candidates": list(problem.candidates),
            "bound": self.bound,
            "bits": self.bits,
            "score": problem.score(scores, self.chosen),
            "places": [
                _place(place, scores[place.name], chosen)
                for place, chosen in zip(problem.places, self.chosen, strict=True)
            ],
            "frontier": [{"bits": bits, "score": score} for bits, score in frontier],
            "excluded": [*_excluded(problem)],
        }


def _place(place: Place, scores: Sequence[float], chosen: int) -> dict[str, Any]:
    return {
        "name": place.name,
        "family": place.family,
        "weights": place.elements,
        "share": float(place.share),
        "options": [
            {
                "format": option.format,
                "candidates": list(option.candidates),
                "bits": 8 * option.nbytes / (place.elements or place.cached),
                "score": score,
                "chosen": i == chosen,
            }
            for i, (option, score) in enumerate(zip(place.options, scores, strict=True))
        ],
    }


def _excluded(problem: Problem) -> list[dict[str, str]]:
    kept = [p.name for p in problem.places if len(p.options) == 1 and not p.cached]
    return [
        *({"name": name, "why": "--auto-quantize-keep"} for name in kept),
        *({"name": name, "why": "no candidate quantizes it"} for name in problem.left),
    ]
