"""Find a recipe for a checkpoint: score the candidates by transformers' forward, then choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_quant.documents import check_output_file
from megatron_quant.errors import RecipeError
from megatron_quant.recipes import QuantPlan, Recipe

if TYPE_CHECKING:
    from megatron_quant.dist import Groups
    from megatron_quant.runs.auto_scores import SearchPlan
    from megatron_quant.runs.job import Job
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.runs.phases import Phases
    from megatron_quant.search import Model, Problem

_REPLAYED = ("max", "mse", "four_over_six")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A recipe that was searched.

    recipe: the recipe. bits: its cost in bits a weight. rows: place, treatment and score of each.
    """

    recipe: Recipe
    bits: float
    rows: tuple[tuple[str, str, float], ...]


def search_again(
    directory: str | Path,
    bits: float,
    *,
    formats: str | None = None,
    cost: str = "weight",
    recipe: str | Path | None = None,
) -> Found:
    """Choose again among scored formats, without a forward.

    Args:
        directory: the ``checkpoint`` of a finished search.
        bits: most bits a weight.
        formats: some of its candidates, with commas between; None for all.
        cost: ``weight`` or ``active``, as in :class:`AutoQuantize`.
        recipe: file for the found recipe; None writes none.

    Raises:
        QuantError: for a directory without finished scores, and bits that cannot be met.
    """
    from megatron_quant.search import NONE, ScoreStore, write_recipe

    file = None if recipe is None else Path(recipe)
    check_output_file("--recipe", file)
    store = ScoreStore(Path(directory))
    problem, scores = store.read()
    if formats is not None:
        wanted = {name.strip() for name in formats.split(",")}
        kept = problem.restricted(sorted(wanted - {"", NONE}))
        scores = _of_options(problem, kept, scores)
        problem = kept
    found = _chosen(problem, scores, bits, cost)
    if file is not None:
        write_recipe(file, found.recipe)
    return found


def with_found_recipe(
    options: "QuantizeOptions", groups: "Groups", phases: "Phases"
) -> "QuantizeOptions":
    """Search for a recipe as ``options`` ask, and return them with it. Collective.

    Raises a QuantError, on every rank, before anything is scored for whatever does not fit.
    """
    from megatron_quant.dist import together
    from megatron_quant.runs.agree import check_options, fetched
    from megatron_quant.runs.auto_scores import scored
    from megatron_quant.search import by_place, check_bits, write_recipe

    auto, file = options.auto, options.auto.recipe
    assert auto.bits is not None
    bits = auto.bits
    check_options(options, groups)
    with phases.time("plan search"):
        options = fetched(options, groups)
        together(groups, lambda: check_output_file("--auto-quantize-recipe", file))
        planned = together(groups, lambda: _planned(options, groups.size))
        problem = planned.problem
        together(groups, lambda: check_bits(problem, bits, auto.cost))
    flat = scored(options, planned, groups, phases)
    found = together(groups, lambda: _chosen(problem, by_place(problem, flat), bits, auto.cost))
    if file is not None:
        together(groups, lambda: write_recipe(file, found.recipe) if groups.rank == 0 else None)
    return replace(options, export_quant_cfg=found.recipe, auto=type(auto)())


def _planned(options: "QuantizeOptions", world: int) -> "SearchPlan":
    from megatron_quant.ckpt.plan import slots
    from megatron_quant.engines import check_serving
    from megatron_quant.runs.auto_scores import SearchPlan
    from megatron_quant.runs.file_to_file import plan_stream
    from megatron_quant.search import check_mixtures, find_problem

    off = type(options.auto)()
    jobs = {
        name: plan_stream(replace(options, export_quant_cfg=name, auto=off), world).job
        for name in options.auto.candidates
    }
    first, plans = next(iter(jobs.values())), {name: job.quant for name, job in jobs.items()}
    _check_candidates(plans)
    dialect, serve = first.dialect, options.serve
    assert dialect is not None
    problem = find_problem(_model(options, first), plans, first.quant.kv_cache)

    def check(plan: QuantPlan) -> None:
        check_serving(plan, first.params, dialect.name, serve.engine, serve.tp, first.hf_config)
        dialect.quantization_config(plan)

    check_mixtures(problem, slots(first.params), check)
    return SearchPlan(first, plans, problem)


def _model(options: "QuantizeOptions", job: "Job") -> "Model":
    import torch

    from megatron_quant.ckpt.dialects import StorageSchemes
    from megatron_quant.search import Model

    assert job.dialect is not None
    fp32 = {s.name: torch.float32 for p in job.params if p.fp32 for s in p.sources}
    schemes = StorageSchemes(job.dialect, job.dtype, {**fp32, **job.kept})
    keep = options.auto.keep
    return Model(params=job.params, config=job.hf_config, schemes=schemes, keep=keep)


def _check_candidates(plans: Mapping[str, QuantPlan]) -> None:
    """Refuse candidates that scoring cannot replay, or whose recipes differ beyond the places."""
    for name, plan in plans.items():
        for d in plan.quantized:
            if d.algorithm not in _REPLAYED or d.searches_tensor:
                raise RecipeError(
                    f"--auto-quantize-formats {name}: the search does not replay algorithm "
                    f"{d.algorithm} of {d.rule}; take max, and --algorithm with the found recipe"
                )
    if len({plan.kv_cache for plan in plans.values()}) > 1:
        raise RecipeError(
            "--auto-quantize-formats: the candidates treat the KV cache differently; say how with "
            "--export-kv-cache-quant"
        )


def _chosen(
    problem: "Problem", scores: Mapping[str, Sequence[float]], bits: float, cost: str
) -> Found:
    """Choose, and write the choice as a recipe."""
    from megatron_quant.search import to_recipe

    chosen = problem.solved(scores, bits, cost)
    found = problem.bits(chosen, cost)
    candidates = ", ".join(problem.candidates)
    about = f"Found among {candidates}: {found:.3f} bits a weight (at most {bits:g}, cost {cost})."
    pairs = zip(problem.places, chosen, strict=True)
    rows = ((p.name, p.options[c].rule.action, scores[p.name][c]) for p, c in pairs)
    recipe = to_recipe(problem, chosen, "the found recipe", about)
    return Found(recipe=recipe, bits=found, rows=tuple(rows))


def _of_options(
    problem: "Problem", kept: "Problem", scores: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Return the scores of the options that are left."""
    found = {}
    for place, fewer in zip(problem.places, kept.places, strict=True):
        by_option = zip(place.options, scores[place.name], strict=True)
        found[place.name] = [score for option, score in by_option if option in fewer.options]
    return found
