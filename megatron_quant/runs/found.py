"""A recipe that was searched, and how it is chosen from scores."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_quant.recipes import Recipe

if TYPE_CHECKING:
    from megatron_quant.search import Choice, Scored


@dataclass(frozen=True, kw_only=True)
class Found:
    """A recipe that was searched.

    recipe: the recipe. choice: what was chosen among what, with all scores.
    """

    recipe: Recipe
    choice: "Choice"

    @property
    def bits(self) -> float:
        """Return the recipe's cost in bits a weight."""
        return self.choice.bits

    @property
    def rows(self) -> list[tuple[str, str, float]]:
        """Return name, treatment and score of each place."""
        found, places = self.choice, self.choice.problem.places
        pairs = zip(places, found.chosen, strict=True)
        return [(p.name, p.options[c].format, found.scores[p.name][c]) for p, c in pairs]

    def document(self) -> dict[str, Any]:
        """Return scores, frontier and choice as JSON (docs/auto_quantize.md has the form)."""
        return self.choice.document()


def chosen(scored: "Scored", bits: float, cost: str, flag: str = "--auto-quantize-bits") -> Found:
    """Choose, and write the choice as a recipe; ``flag`` gave ``bits``."""
    from megatron_quant.search import Choice, to_recipe

    problem, scores = scored.problem, scored.scores
    choice = Choice(
        problem=problem,
        scores=scores,
        chosen=problem.solved(scores, bits, cost, flag),
        method=scored.method,
        cost=cost,
        bound=bits,
    )
    candidates, found = ", ".join(problem.candidates), choice.bits
    about = f"Found among {candidates}: {found:.3f} bits a weight (at most {bits:g}, cost {cost})."
    return Found(recipe=to_recipe(problem, choice.chosen, "the found recipe", about), choice=choice)
