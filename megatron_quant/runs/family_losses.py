"""Measure what each family of weights, and the KV cache, loses in each format alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite

import torch
from transformers import PreTrainedModel

from megatron_quant.dist import Groups, max_reduce, sum_reduce, together
from megatron_quant.errors import CalibrationError, QuantError
from megatron_quant.evaluation import nll_and_kl
from megatron_quant.models import Role, positive, text_config
from megatron_quant.recipes import KV_CACHES, Recipe, Rule, cache_slots, load_recipe
from megatron_quant.runs.agree import check_options, fetched
from megatron_quant.runs.auto_scores import Work, read_samples
from megatron_quant.runs.file_to_file import plan_stream
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.search_plan import SearchPlan, Target, places_of
from megatron_quant.runs.sensitivity_rows import FamilyLoss, Sensitivity
from megatron_quant.runs.settings import AutoQuantize
from megatron_quant.runs.stream_scores import loaded_places
from megatron_quant.search import (
    KV_CACHE,
    MeasuredCache,
    PlaceWeights,
    RoundedCache,
    ablated,
    families,
    option_of,
)

_KV_BITS = 8.0


@dataclass(frozen=True)
class _Trial:
    """Names what is rounded at once: places, or the cache that ``cache`` makes."""

    row: FamilyLoss
    chosen: tuple[tuple[PlaceWeights, Rule], ...] = ()
    cache: Callable[[], RoundedCache] | None = None

    def logits(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [B * S, V] of ids [B, S]."""
        with ablated(model, self.chosen):
            return _logits(model, ids, None if self.cache is None else self.cache())


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
    work = Work(
        plan=plan,
        auto=AutoQuantize(),
        calibration=data,
        batches=batches,
        source="",
        dtype=options.dtype,
    )
    own = batches[groups.rank :: groups.size]
    model, places = loaded_places(work, job.source, own, groups, phases)
    trials = _trials(plan, places)
    if cache_slots(replace(next(iter(plan.plans.values())), kv_cache=KV_CACHES[0])):
        trials += _cache_trials(model, own, groups)
    else:
        left_out.append(f"{KV_CACHE}: the model caches no keys and values as they are")

    def run() -> torch.Tensor:
        found = torch.zeros(len(trials), dtype=torch.float64)
        with phases.bar("measure", len(own)) as progress, torch.no_grad():
            for ids in own:
                before, labels = _logits(model, ids), ids.flatten()
                for i, trial in enumerate(trials):
                    found[i] += nll_and_kl(trial.logits(model, ids), before, labels).kl
                progress(1)
        return found

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


def _trials(plan: SearchPlan, places: Sequence[PlaceWeights]) -> list[_Trial]:
    """Return the trials of weights: family by family, each in every recipe that changes it."""
    trials = []
    for family, members in families(plan.problem.places).items():
        for name in plan.plans:
            found = [(places[i], option_of(places[i].place, name)) for i in members]
            chosen = tuple((p, option.rule) for p, option in found if option is not None)
            weights = sum(p.place.elements for p, _ in chosen)
            stored = sum(option.nbytes for _, option in found if option is not None)
            if chosen:
                bits = 8 * stored / weights
                row = FamilyLoss(family=family, format=name, weights=weights, bits=bits)
                trials.append(_Trial(row, chosen))
    return trials


def _cache_trials(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], groups: Groups
) -> list[_Trial]:
    """Return the trials of the KV cache; measures keys and values. Collective."""
    amaxes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def measure() -> None:
        with torch.no_grad():
            for ids in batches:
                _logits(model, ids, MeasuredCache(model, amaxes))

    together(groups, measure)
    layers = positive(text_config(model.config.to_dict()), "num_hidden_layers")
    flat = torch.zeros(layers, 2)
    for layer, both in amaxes.items():
        flat[layer] = torch.stack(both).float()
    merged = {i: (row[0], row[1]) for i, row in enumerate(max_reduce(flat, groups))}
    given = {"fp8": merged, "fp8_cast": None}
    return [
        _Trial(
            FamilyLoss(family=KV_CACHE, format=name, weights=0, bits=_KV_BITS),
            cache=partial(RoundedCache, model, given[name]),
        )
        for name in KV_CACHES
    ]


def _logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: MeasuredCache | RoundedCache | None = None,
) -> torch.Tensor:
    out = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    logits: torch.Tensor = out.logits.flatten(0, 1)
    return logits
