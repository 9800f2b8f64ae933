"""The values that a search is about: places, the options at each, their costs and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import floor, inf, isfinite, lcm

from megatron_quant.errors import RecipeError
from megatron_quant.recipes import Rule
from megatron_quant.search.names import COSTS, NONE
from megatron_quant.search.solver import solve

_BITS_PER_BYTE = 8
SEARCH_BITS = "--auto-quantize-bits"
"""The flag of a search that says how many bits it may take."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One treatment of a place.

    Attributes:
        candidates: Candidates that treat the place so.
        rule: Its formats and algorithm; its patterns do not matter.
        nbytes: Bytes that all tensors of the place then have on disk; of the KV cache, those that
            a token reads.
        kv_cache: Format of the KV cache, as recipes name it; empty if it stays as it is.
    """

    candidates: tuple[str, ...]
    rule: Rule
    nbytes: int
    kv_cache: str = ""

    @property
    def changes(self) -> bool:
        """Return whether anything is rounded."""
        return self.rule.weights is not None or bool(self.kv_cache)

    @property
    def action(self) -> str:
        """Return what it does, in short."""
        return self.kv_cache or self.rule.action

    @property
    def format(self) -> str:
        """Return the formats that it gives; :data:`NONE` if it leaves the place as it is."""
        return self.action if self.changes else NONE


@dataclass(frozen=True, kw_only=True)
class Place:
    """Weights that have one treatment, because engines run them as one.

    Attributes:
        name: Its name in messages and tables.
        family: Kind of place, alike in all layers (``self_attn.o_proj``).
        modules: Hugging Face modules of its weights.
        output: Whether it is the output layer.
        elements: Number of its weights.
        active: How many of ``stored`` equal parts of it a token meets.
        stored: Number of those parts: the experts; 1 for a place that every token meets.
        options: At least one; one of them has candidate ``none``.
        cached: Of the KV cache, the values that a token reads; 0 for weights.
    """

    name: str
    family: str
    modules: tuple[str, ...]
    output: bool
    elements: int
    active: int
    stored: int
    options: tuple[Option, ...]
    cached: int = 0

    @property
    def share(self) -> Fraction:
        """Return the part of it that a token meets."""
        return Fraction(self.active, self.stored)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A search before anything is scored; equal on all ranks and at every layout.

    Attributes:
        places: The places, in the order of the model.
        candidates: Names of the candidates, ``none`` last.
        left: Modules that no candidate quantizes.
        kv_cache: That of the found recipe, where the cache is no place.
    """

    places: tuple[Place, ...]
    candidates: tuple[str, ...]
    left: tuple[str, ...] = ()
    kv_cache: str = ""

    @property
    def cache(self) -> Place | None:
        """Return the place of the KV cache, if that is one."""
        return next((place for place in self.places if place.cached), None)

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Return where the options of each place are among those of all, by its name."""
        ends = [*accumulate(len(p.options) for p in self.places)]
        parts = zip(self.places, ends, strict=True)
        return {p.name: slice(end - len(p.options), end) for p, end in parts}

    def restricted(self, candidates: Sequence[str]) -> "Problem":
        """Return the problem with some of its candidates, and ``none``.

        Raises:
            RecipeError: For a candidate that was not scored.
        """
        wanted = {*candidates, NONE}
        if unknown := sorted(wanted - set(self.candidates)):
            raise RecipeError(
                f"{unknown[0]!r} was not scored: choose among {', '.join(self.candidates)}, or "
                "score again with it in --auto-quantize-formats"
            )
        places = tuple(
            replace(p, options=tuple(o for o in p.options if wanted & set(o.candidates)))
            for p in self.places
        )
        return replace(
            self, places=places, candidates=tuple(c for c in self.candidates if c in wanted)
        )

    def bits(self, chosen: Sequence[int], cost: str) -> float:
        """Return the cost of an option at each place, in bits a weight."""
        found = (_cost(p, p.options[c], cost) for p, c in zip(self.places, chosen, strict=True))
        return float(sum(found) / self._weights(cost))

    def score(self, scores: Mapping[str, Sequence[float]], chosen: Sequence[int]) -> float:
        """Return the sum of the scores of an option at each place."""
        return sum(scores[p.name][c] for p, c in zip(self.places, chosen, strict=True))

    def _weights(self, cost: str) -> Fraction:
        return sum((p.elements * _share(p, cost) for p in self.places), Fraction(0))

    def bounds(self, cost: str) -> tuple[float, float]:
        """Return the least and the largest bits a weight that a choice can have."""
        low, high = self._bounds(cost)
        return float(low), float(high)

    def _bounds(self, cost: str) -> tuple[Fraction, Fraction]:
        each = [[_cost(p, o, cost) for o in p.options] for p in self.places]
        weights = self._weights(cost)
        return sum(map(min, each), Fraction(0)) / weights, sum(map(max, each)) / weights

    def solved(
        self,
        scores: Mapping[str, Sequence[float]],
        bits: float,
        cost: str,
        flag: str = SEARCH_BITS,
    ) -> tuple[int, ...]:
        """Choose an option at each place: the least sum of scores within ``bits`` a weight.

        Args:
            scores: Score of each option of each place, by the place's name.
            bits: The bound, which is never exceeded.
            cost: One of :data:`COSTS`.
            flag: The flag that gave ``bits``, for messages.

        Raises:
            RecipeError: As :func:`check_bits`, and where the KV cache alone meets the bound.
        """
        check_bits(self, bits, cost, flag)
        found = self._best(scores, Fraction(str(bits)), cost)
        options = [p.options[c] for p, c in zip(self.places, found, strict=True)]
        if options[-1].kv_cache and not any(o.rule.weights for o in options):
            raise RecipeError(
                f"{flag} {bits:g} is met by the KV cache in {options[-1].kv_cache} alone, and a "
                "recipe quantizes weights: allow fewer bits, or search without "
                "--auto-quantize-context-length"
            )
        return found

    def _best(
        self, scores: Mapping[str, Sequence[float]], bits: Fraction, cost: str
    ) -> tuple[int, ...]:
        whole = lcm(*(p.stored for p in self.places))
        costs = [[int(_cost(p, o, cost) * whole) for o in p.options] for p in self.places]
        limit = floor(bits * self._weights(cost) * whole)
        return solve(costs, [list(scores[p.name]) for p in self.places], limit)

    def frontier(
        self, scores: Mapping[str, Sequence[float]], cost: str, points: int
    ) -> list[tuple[float, float]]:
        """Return (bits, score) of the best choices within ``points`` rising bounds, each once.

        The first bound is the least that can be met; the last one leaves every weight as it is.
        """
        low, high = self._bounds(cost)
        bounds = [low + (high - low) * i / (points - 1) for i in range(points)]
        each = [self._best(scores, bits, cost) for bits in bounds]
        return sorted({(self.bits(c, cost), self.score(scores, c)) for c in each})


def check_bits(problem: Problem, bits: float, cost: str, flag: str = SEARCH_BITS) -> None:
    """Refuse a bound that no choice meets, or that every choice meets.

    flag: the one that gave ``bits``, for messages.

    Raises:
        RecipeError: Names the bound and the nearest that can be met.
    """
    if cost not in COSTS:
        raise RecipeError(f"--auto-quantize-cost is {cost!r}: give one of {', '.join(COSTS)}")
    whole = next((p for p in problem.places if p.active == p.stored > 1), None)
    if cost == "active" and whole is not None:
        raise RecipeError(
            f"--auto-quantize-cost active: config.json does not say that a token meets fewer than "
            f"all {whole.stored} of {whole.name}; take weight"
        )
    if not (isfinite(bits) and bits > 0):
        raise RecipeError(f"{flag} is {bits}: give bits a weight, such as 5.0")
    low, high = problem.bounds(cost)
    if bits < low:
        raise RecipeError(
            f"{flag} {bits:g} is below {_rounded_up(low)}, the least that "
            f"{', '.join(problem.candidates[:-1])} take with their scales (cost {cost}): allow "
            "more bits, or add a smaller format"
        )
    if bits >= high:
        raise RecipeError(
            f"{flag} {bits:g} would leave every weight as it is, at {high:g} bits: allow fewer"
        )


def _rounded_up(bits: float) -> str:
    return f"{-floor(-bits * 1000) / 1000:g}" if bits < inf else "inf"


def _share(place: Place, cost: str) -> Fraction:
    if cost == "active":
        return place.share
    return Fraction(0 if place.cached else 1)  # a cache is not stored


def _cost(place: Place, option: Option, cost: str) -> Fraction:
    """Return the bits of a place under an option."""
    return _BITS_PER_BYTE * option.nbytes * _share(place, cost)
