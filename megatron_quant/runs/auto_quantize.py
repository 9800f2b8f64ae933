"""Find a recipe for a checkpoint: score the candidates, then choose."""

import gc
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from megatron_quant.documents import check_output_file
from megatron_quant.runs.found import Found, chosen

if TYPE_CHECKING:
    import torch

    from megatron_quant.dist import Groups
    from megatron_quant.mcore.model import LiveModel
    from megatron_quant.runs.job import Job
    from megatron_quant.runs.options import QuantizeOptions
    from megatron_quant.runs.phases import Phases
    from megatron_quant.runs.search_plan import SearchPlan
    from megatron_quant.runs.settings import AutoQuantize
    from megatron_quant.runs.start import Unquantized
    from megatron_quant.search import Loss


def with_found_recipe(
    options: "QuantizeOptions", groups: "Groups", phases: "Phases"
) -> "tuple[QuantizeOptions, Found]":
    """Search for a recipe as ``options`` ask; return them with it, and what was found. Collective.

    Raises a QuantError, on every rank, before anything is scored for whatever does not fit.
    """
    found = found_recipe(options, groups, phases)
    cache = options.export_kv_cache_quant if options.auto.context_length is None else None
    off = type(options.auto)()
    given = replace(options, export_quant_cfg=found.recipe, export_kv_cache_quant=cache, auto=off)
    return given, found


def found_recipe(
    options: "QuantizeOptions",
    groups: "Groups",
    phases: "Phases",
    loss: "Loss | None" = None,
) -> Found:
    """Search for a recipe as ``options`` ask. Collective; raises as :func:`with_found_recipe`.

    loss: that whose gradients score; None for that of the next token.
    """
    from megatron_quant.dist import together
    from megatron_quant.models import positive, text_config
    from megatron_quant.runs.agree import check_options, fetched
    from megatron_quant.runs.auto_scores import Work, read_samples
    from megatron_quant.runs.destination import origin_of
    from megatron_quant.runs.start import opened_unquantized
    from megatron_quant.search import next_token_loss

    check_options(options, groups)
    auto = options.auto
    with phases.time("plan search"):
        options = fetched(options, groups)
        together(groups, lambda: check_output_file("--auto-quantize-recipe", auto.recipe))
        options, model = opened_unquantized(options, groups)
        job, plan = together(groups, lambda: plan_candidates(options, groups.size, model))
        digest = together(groups, lambda: origin_of(job).source)
    vocab_size = together(groups, lambda: positive(text_config(job.hf_config), "vocab_size"))
    data = replace(options.calibration, size=auto.score_size)
    work = Work(
        plan=plan,
        auto=auto,
        calibration=options.calibration,
        batches=read_samples(data, job.source, vocab_size, groups, phases),
        source=digest,
        dtype=options.dtype,
        loss=loss or next_token_loss,
        caches=_caches(plan) if options.stream else {},
    )
    if options.stream:
        from megatron_quant.runs.stream_scores import stream_scores

        flat = stream_scores(work, job.source, groups, phases)
    else:
        from megatron_quant.runs.live_scores import LiveSource, live_scores

        load = partial(_loaded, job, groups, phases)
        live = LiveSource(load=load, vocab_size=vocab_size)
        flat = live_scores(work, live, groups, phases)
        gc.collect()  # the model that was scored, before the one that is quantized is built
    return choose(plan, flat, auto, groups)


def choose(
    plan: "SearchPlan", flat: "torch.Tensor", auto: "AutoQuantize", groups: "Groups"
) -> Found:
    """Choose by the scores of all options, and write the recipe's file. Collective."""
    from megatron_quant.dist import together
    from megatron_quant.search import Scored, by_place, write_recipe

    bits, file = auto.bits, auto.recipe
    assert bits is not None
    scores = Scored(plan.problem, by_place(plan.problem, flat), auto.method)
    found = together(groups, lambda: chosen(scores, bits, auto.cost))
    if file is not None:
        together(groups, lambda: write_recipe(file, found.recipe) if groups.rank == 0 else None)
    return found


def _caches(plan: "SearchPlan") -> "dict[int, list[str]]":
    """Return the cache slots of each layer whose keys and values are measured to be scored."""
    from megatron_quant.streaming import calibrated_caches

    if plan.problem.cache is None:
        return {}
    each = (calibrated_caches(q, plan.target.params) for q in plan.plans.values())
    return next(filter(None, each), {})


def plan_candidates(
    options: "QuantizeOptions", world: int, model: "Unquantized"
) -> "tuple[Job, SearchPlan]":
    """Plan what every candidate would do, and the search among them; return the first one's job.

    Raises a QuantError for whatever does not fit.
    """
    from megatron_quant.runs.job_checks import check_length
    from megatron_quant.runs.search_plan import Target, plan_search

    off = type(options.auto)()
    jobs = {
        name: _job(replace(options, export_quant_cfg=name, auto=off), world, model)
        for name in options.auto.candidates
    }
    first = next(iter(jobs.values()))
    sizes = options.parallel
    check_length(options.calibration.seq_length, sizes.tp, sizes.cp)
    target = Target.of(first, options.serve)
    plans = {name: job.quant for name, job in jobs.items()}
    return first, plan_search(target, plans, options.auto)


def _job(options: "QuantizeOptions", world: int, model: "Unquantized") -> "Job":
    """Return what a candidate would do alone."""
    from megatron_quant.runs.file_to_file import plan_stream
    from megatron_quant.runs.job import prepare_job

    if options.stream:
        return plan_stream(options, world, model).job
    exporting = replace(options, megatron_save_path=None)  # what an export takes is what it costs
    return prepare_job(exporting, world, open_weights=model.open_weights, config=model.config)


def _loaded(job: "Job", groups: "Groups", phases: "Phases") -> "LiveModel":
    """Build the model and load its weights. Collective."""
    from megatron_quant.dist import together
    from megatron_quant.mcore.model import load_model, local_params
    from megatron_quant.models import DRAFTS

    assert job.architecture is not None and job.checkpoint is not None
    live = [param for param in job.params if param.role not in DRAFTS]
    held = together(groups, lambda: len(local_params(live, job.layout, groups.rank)))
    with phases.bar("load", held) as progress:
        return load_model(job.checkpoint, job.architecture, job.layout, groups, job.dtype, progress)
