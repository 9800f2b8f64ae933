"""Find a recipe for a checkpoint: score the candidates by transformers' forward, then choose."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_quant.documents import check_output_file
from megatron_quant.errors import RecipeError
from megatron_quant.recipes import QuantPlan
from megatron_quant.runs.found import Found, chosen

if TYPE_CHECKING:
    from megatron_quant.dist import Groups
    from megatron_quant.runs.auto_scores import SearchPlan
    from megatron_quant.runs.job import Job
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.runs.phases import Phases
    from megatron_quant.search import Model

_REPLAYED = ("max", "mse", "four_over_six")


def with_found_recipe(
    options: "QuantizeOptions", groups: "Groups", phases: "Phases"
) -> "tuple[QuantizeOptions, Found]":
    """Search for a recipe as ``options`` ask; return them with it, and what was found. Collective.

    Raises a QuantError, on every rank, before anything is scored for whatever does not fit.
    """
    from megatron_quant.dist import together
    from megatron_quant.runs.agree import check_options, fetched
    from megatron_quant.runs.auto_scores import scored
    from megatron_quant.search import Scored, by_place, check_bits, write_recipe

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
    scores = Scored(problem, by_place(problem, flat), auto.method)
    found = together(groups, lambda: chosen(scores, bits, auto.cost))
    if file is not None:
        together(groups, lambda: write_recipe(file, found.recipe) if groups.rank == 0 else None)
    return replace(options, export_quant_cfg=found.recipe, auto=type(auto)()), found


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
