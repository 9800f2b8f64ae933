"""Measure what each family of weights, and the KV cache, loses in each format alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch

from megatron_quant.dist import Groups, sum_reduce, together
from megatron_quant.errors import CalibrationError, QuantError
from megatron_quant.models import Role, positive, text_config
from megatron_quant.recipes import KV_CACHES, Recipe, load_recipe
from megatron_quant.runs.agree import check_options, fetched
from megatron_quant.runs.auto_scores import Work, read_samples
from megatron_quant.runs.file_to_file import plan_stream
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.search_plan import SearchPlan, Target, places_of
from megatron_quant.runs.sensitivity_rows import FamilyLoss, Sensitivity
from megatron_quant.runs.settings import AutoQuantize
from megatron_quant.runs.stream_scores import (
    Layers,
    divergences,
    measured_layers,
    work_folder,
)
from megatron_quant.search import (
    KV_CACHE,
    Change,
    families,
    option_of,
)
from megatron_quant.streaming import calibrated_caches

_KV_BITS = 8.0


@dataclass(frozen=True)
class _Trial:
    """Names what is rounded at once: places, or the cache that ``cache`` makes."""

    row: FamilyLoss
    change: Change


def measured(
    options: QuantizeOptions, names: Sequence[str], groups: Groups, phases: Phases
) -> Sensitivity:
    """Measure as :func:`sensitivity` says. Collective.

    options: a streamed run of the first of ``names``. names: the recipes.
    """
    check_options(options, groups)
    with phases.time("plan"):
        options = fetched(options, groups)
        job, plan, left_out = together(groups, lambda: _planned(options, names, groups.size))
    vocab_size = together(groups, lambda: positive(text_config(job.hf_config), "vocab_size"))
    data = options.calibration
    batches = read_samples(data, job.source, vocab_size, groups, phases)
    caches = calibrated_caches(
        replace(next(iter(plan.plans.values())), kv_cache="fp8"), plan.target.params
    )
    work = Work(
        plan=plan,
        auto=AutoQuantize(),
        calibration=data,
        batches=batches,
        source="",
        dtype=options.dtype,
        caches=caches,
    )
    own = batches[groups.rank :: groups.size]
    with work_folder(work, groups) as place:
        layers = measured_layers(work, job.source, own, place, groups, phases)
        trials = _trials(plan)
        if caches:
            trials += _cache_trials(layers)
        else:
            left_out.append(f"{KV_CACHE}: the model caches no keys and values as they are")

        def run() -> torch.Tensor:
            if layers is None:
                return torch.zeros(len(trials), dtype=torch.float64)
            return divergences(layers, [t.change for t in trials], place, phases).sum(0)

        sums = sum_reduce(together(groups, run), groups).tolist()
    tokens = sum(ids.numel() for ids in batches)
    rows = tuple(_row(trial.row, kl, tokens) for trial, kl in zip(trials, sums, strict=True))
    return Sensitivity(rows, tuple(left_out), tokens)


def _row(row: FamilyLoss, kl: float, tokens: int) -> FamilyLoss:
    if not isfinite(kl):
        raise CalibrationError(
            f"the divergence is {kl} with {row.family} in {row.format}: repair the checkpoint, or "
            "choose another --dtype"
        )
    return replace(row, kl=max(kl, 0.0) / tokens)


def _planned(
    options: QuantizeOptions, names: Sequence[str], world: int
) -> tuple[Job, SearchPlan, list[str]]:
    """Plan every recipe, with the output layer quantized where its format can be."""
    left_out: list[str] = []
    jobs = {}
    for name in names:
        recipe, given = load_recipe(name), replace(options, export_quant_cfg=name)
        job = plan_stream(given, world).job
        try:
            with_head = replace(given, export_quant_cfg=_with_head(recipe, job))
            jobs[name] = plan_stream(with_head, world).job
        except QuantError as e:
            left_out.append(f"lm_head in {name}: {e}")
            jobs[name] = job
    first = next(iter(jobs.values()))
    target = Target.of(first, options.serve)
    plans = {name: replace(job.quant, kv_cache="") for name, job in jobs.items()}
    problem = places_of(target, plans, keep=())
    return first, SearchPlan(target=target, plans=plans, problem=problem), left_out


def _with_head(recipe: Recipe, job: Job) -> Recipe:
    """Return a recipe that quantizes the output layer too, in the format of its first rule."""
    heads = [p.sources[0].module for p in job.params if p.role is Role.OUTPUT]
    first = next(rule for rule in recipe.rules if rule.weights is not None)
    if not heads:
        return recipe
    head = replace(first, patterns=tuple(heads), optional=False, allow_output=True)
    return replace(recipe, rules=(head, *recipe.rules))


def _trials(plan: SearchPlan) -> list[_Trial]:
    """Return the trials of weights: family by family, each in every recipe that changes it."""
    trials, places = [], plan.problem.places
    for family, members in families(places).items():
        for name in plan.plans:
            options = [(places[i], option_of(places[i], name)) for i in members]
            found = [(place, option) for place, option in options if option is not None]
            weights = sum(place.elements for place, _ in found)
            if found:
                bits = 8 * sum(option.nbytes for _, option in found) / weights
                row = FamilyLoss(family=family, format=name, weights=weights, bits=bits)
                rules = {place.name: option.rule for place, option in found}
                trials.append(_Trial(row, Change(rules)))
    return trials


def _cache_trials(layers: Layers | None) -> list[_Trial]:
    """Return the trials of the KV cache; without layers nothing is changed."""
    return [
        _Trial(
            FamilyLoss(family=KV_CACHE, format=name, weights=0, bits=_KV_BITS),
            Change({}) if layers is None else layers.cache_change(name),
        )
        for name in KV_CACHES
    ]
