"""A recipe that was searched, and how it is chosen again from kept scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.documents import check_output_file
from megatron_quant.recipes import Recipe

if TYPE_CHECKING:
    from megatron_quant.search import Choice, Problem, Scored


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
        return [(p.name, p.options[c].rule.action, found.scores[p.name][c]) for p, c in pairs]

    def document(self) -> dict[str, Any]:
        """Return scores, frontier and choice as JSON (docs/auto_quantize.md has the form)."""
        return self.choice.document()


def search_again(
    directory: str | Path,
    bits: float,
    *,
    formats: str | None = None,
    cost: str = "weight",
    recipe: str | Path | None = None,
    report: str | Path | None = None,
    log_to: str | None = None,
) -> Found:
    """Choose again among scored formats, without a forward.

    Args:
        directory: the ``checkpoint`` of a finished search.
        bits: most bits a weight.
        formats: some of its candidates, with commas between; None for all.
        cost: ``weight`` or ``active``, as in :class:`AutoQuantize`.
        recipe: file for the found recipe; None writes none.
        report: file for the scores and the choice: a page (.html), with the same as .json beside
            it; with another ending JSON alone.
        log_to: tracker that gets them: ``mlflow``, ``mlflow:URI``, ``tensorboard:DIR``.

    Raises:
        QuantError: for a directory without finished scores, and bits that cannot be met.
    """
    from megatron_quant.dist import Groups
    from megatron_quant.runs.facts import of_found
    from megatron_quant.runs.report import check_report, reporting, write_report
    from megatron_quant.search import NONE, Scored, ScoreStore, write_recipe

    where = reporting(report, log_to)
    check_report(where, Groups(), directory)
    file = None if recipe is None else Path(recipe)
    check_output_file("--recipe", file)
    store = ScoreStore(Path(directory))
    scored = store.read()
    problem, scores = scored.problem, scored.scores
    if formats is not None:
        wanted = {name.strip() for name in formats.split(",")}
        kept = problem.restricted(sorted(wanted - {"", NONE}))
        scores = _of_options(problem, kept, scores)
        problem = kept
    found = chosen(Scored(problem, scores, scored.method), bits, cost)
    if file is not None:
        write_recipe(file, found.recipe)
    write_report(where, Groups(), lambda: of_found(found, str(directory)))
    return found


def chosen(scored: "Scored", bits: float, cost: str) -> Found:
    """Choose, and write the choice as a recipe."""
    from megatron_quant.search import Choice, to_recipe

    problem, scores = scored.problem, scored.scores
    choice = Choice(
        problem=problem,
        scores=scores,
        chosen=problem.solved(scores, bits, cost),
        method=scored.method,
        cost=cost,
        bound=bits,
    )
    candidates, found = ", ".join(problem.candidates), choice.bits
    about = f"Found among {candidates}: {found:.3f} bits a weight (at most {bits:g}, cost {cost})."
    return Found(recipe=to_recipe(problem, choice.chosen, "the found recipe", about), choice=choice)


def _of_options(
    problem: "Problem", kept: "Problem", scores: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Return the scores of the options that are left."""
    found = {}
    for place, fewer in zip(problem.places, kept.places, strict=True):
        by_option = zip(place.options, scores[place.name], strict=True)
        found[place.name] = [score for option, score in by_option if option in fewer.options]
    return found
