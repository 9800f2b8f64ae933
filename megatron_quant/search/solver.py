"""Choose one option at each place: the least score whose cost stays within a limit, exactly.

This is the multiple-choice knapsack problem. States (cost, score) are extended place by place. A
state is dropped if another one costs no more and scores no more, or if a Lagrangian bound shows
that it cannot beat a choice that is known. Costs are integers, so the limit is never exceeded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_HALVINGS = 128
_SLACK = 1e-12
"""Part of the largest sum by which rounding may raise a bound."""


@dataclass(frozen=True)
class _Options:
    """The options of one place: int64 [C] costs, fp64 [C] scores."""

    costs: torch.Tensor
    scores: torch.Tensor

    def best(self, price: float) -> int:
        """Return the option of least score and priced cost; the cheapest of equal ones."""
        priced = self.scores + price * self.costs.double()
        return min(range(len(priced)), key=lambda c: (priced[c].item(), self.costs[c].item()))

    def bound(self, price: float) -> float:
        """Return the least priced score."""
        return float((self.scores + price * self.costs.double()).min())

    @property
    def least(self) -> int:
        """Return the least cost."""
        return int(self.costs.min())


def solve(
    costs: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], limit: int
) -> tuple[int, ...]:
    """Return the option chosen at each place.

    Args:
        costs: Cost of each option of each place.
        scores: Score of each option of each place, finite; less is better.
        limit: Most that the options may cost together; the cheapest ones must fit.

    Ties are broken alike every time: the least cost, then the earlier option.
    """
    places = [
        _Options(torch.tensor(c, dtype=torch.int64), torch.tensor(s, dtype=torch.float64))
        for c, s in zip(costs, scores, strict=True)
    ]
    assert sum(p.least for p in places) <= limit, "the cheapest options do not fit"
    order = sorted(range(len(places)), key=lambda i: -int(places[i].costs.max()))
    price = _price(places, limit)
    known = _improved(places, [p.best(price) for p in places], limit)
    found = _extended([places[i] for i in order], price, limit, _score(places, known))
    return tuple(option for _, option in sorted(zip(order, found, strict=True)))


def _score(places: Sequence[_Options], chosen: Sequence[int]) -> float:
    return sum(float(p.scores[c]) for p, c in zip(places, chosen, strict=True))


def _cost(places: Sequence[_Options], chosen: Sequence[int]) -> int:
    return sum(int(p.costs[c]) for p, c in zip(places, chosen, strict=True))


def _price(places: Sequence[_Options], limit: int) -> float:
    """Return nearly the least price of a unit of cost at which the best options fit."""
    low, high = 0.0, 1.0
    spread = sum(float(p.scores.max() - p.scores.min()) for p in places)
    if _cost(places, [p.best(low) for p in places]) <= limit:
        return low
    high = max(spread, 1e-300) * 2  # a unit of cost then weighs more than every score
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = _cost(places, [p.best(middle) for p in places]) <= limit
        low, high = (low, middle) if fits else (middle, high)
    return high


def _improved(places: Sequence[_Options], chosen: list[int], limit: int) -> list[int]:
    """Use up what the limit leaves, place by place."""
    left = limit - _cost(places, chosen)
    for i, place in enumerate(places):
        now = chosen[i]
        room = int(place.costs[now]) + left
        fitting = [c for c in range(len(place.costs)) if place.costs[c] <= room]
        chosen[i] = min(fitting, key=lambda c: float(place.scores[c]))
        left = room - int(place.costs[chosen[i]])
    return chosen


def _extended(
    places: Sequence[_Options], price: float, limit: int, known: float
) -> tuple[int, ...]:
    """Return the best options, in the order of ``places``, by extending states."""
    scale = sum(float(p.scores.abs().max()) for p in places) + price * limit
    most = known + _SLACK * scale
    least = sum(p.least for p in places)
    bound = sum(p.bound(price) for p in places)
    costs, scores = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    for place in places:
        least, bound = least - place.least, bound - place.bound(price)
        new_costs = (costs[:, None] + place.costs).flatten()
        new_scores = (scores[:, None] + place.scores).flatten()
        possible = new_costs + least <= limit
        possible &= new_scores + bound - price * (limit - new_costs).double() <= most
        kept = _undominated(new_costs, new_scores, possible.nonzero().flatten())
        costs, scores = new_costs[kept], new_scores[kept]
        steps.append((kept // len(place.costs), kept % len(place.costs)))
    at = len(costs) - 1  # the last one costs most and scores least
    chosen = []
    for parents, options in reversed(steps):
        chosen.append(int(options[at]))
        at = int(parents[at])
    return tuple(reversed(chosen))


def _undominated(costs: torch.Tensor, scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Return those of ``among`` that no cheaper state equals or beats, by rising cost."""
    by_score = among[torch.argsort(scores[among], stable=True)]
    order = by_score[torch.argsort(costs[by_score], stable=True)]
    ranked = scores[order]
    before = torch.cummin(ranked, 0).values
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = ranked[1:] < before[:-1]
    return order[first]
