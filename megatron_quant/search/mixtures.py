"""Find out, before anything is scored, whether the candidates can stand beside one another."""

from collections.abc import Callable, Sequence
from itertools import permutations

from megatron_quant.errors import QuantError, RecipeError
from megatron_quant.recipes import QuantPlan, Slot, resolve
from megatron_quant.search.found import to_recipe
from megatron_quant.search.problem import Place, Problem


def check_mixtures(
    problem: Problem, slots: Sequence[Slot], check: Callable[[QuantPlan], None]
) -> None:
    """Check plans in which every two candidates take turns, place by place.

    Args:
        problem: The places.
        slots: Every logical weight of the model.
        check: Raises a QuantError for a plan that the dialect or its engines do not take.

    Raises:
        RecipeError: Names two candidates that cannot be mixed, and why.
    """
    for pair in permutations(problem.candidates, 2):
        chosen = [_option(p, pair[i % 2]) for i, p in enumerate(problem.places)]
        rules = [p.options[c].rule for p, c in zip(problem.places, chosen, strict=True)]
        if all(rule.weights is None for rule in rules):
            continue
        try:
            check(resolve(to_recipe(problem, chosen, " and ".join(pair), ""), slots))
        except QuantError as e:
            raise RecipeError(
                f"--auto-quantize-formats: {pair[0]} and {pair[1]} cannot be mixed ({e})"
            ) from None


def _option(place: Place, candidate: str) -> int:
    """Return the option that a candidate takes; the last, ``none``, at a place that is kept."""
    with_it = (i for i, o in enumerate(place.options) if candidate in o.candidates)
    return next(with_it, len(place.options) - 1)
