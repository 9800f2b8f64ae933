"""Find the places of a search in a live model, and prepare each of their options."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron.core import parallel_state as mpu
from torch import nn

from megatron_quant.calib import (
    InputRules,
    calibrate,
    calibrate_kv_cache,
    calibrate_weights,
    load_inputs,
    run_rest,
    watch,
)
from megatron_quant.dist import together
from megatron_quant.layers import ExpertScales, QuantLayer, refit
from megatron_quant.mcore.live import forced_experts
from megatron_quant.mcore.model import LiveModel, LocalParam, attach_model
from megatron_quant.mcore.search.cache import cache_format, live_cache
from megatron_quant.mcore.search.scope import Fitted, LivePlace, Scope
from megatron_quant.models import Parallel
from megatron_quant.recipes import QuantPlan
from megatron_quant.search import Place, Problem

_BLOCKS = (".experts.", ".shared_experts.")
"""Parts of a layer that are scored at one output, by what stands in their parameters' names."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Name what is scored.

    Attributes:
        problem: The places; equal on all ranks.
        plans: Candidate -> its plan.
        expert_scales: Whether experts share a weight amax.
    """

    problem: Problem
    plans: Mapping[str, QuantPlan]
    expert_scales: ExpertScales = ExpertScales.SHARED


def live_places(
    model: LiveModel,
    candidates: Candidates,
    forwards: Sequence[Callable[[], object]],
    rules: InputRules,
) -> list[LivePlace]:
    """Give a live model's modules quantizers, all off, and fit those of every option. Collective.

    Args:
        model: The model; :func:`as_before` makes it as it was.
        candidates: What is scored.
        forwards: Run the samples through the model, for the scales of inputs that are static, and
            of keys and values.
        rules: How those scales follow.

    Raises:
        QuantError: On every rank alike, for a layer that cannot carry a quantizer, a weight, input,
            key or value that is not finite, or a cold expert.
    """
    union = _union(tuple(candidates.plans.values()), cache_format(candidates.problem))
    scales = candidates.expert_scales
    layers, cached = together(model.groups, lambda: attach_model(model, union, scales))
    rules = replace(rules, token_replicas=model.layout.etp_size)
    steps = [partial(_forced, model, layers, rules, forward) for forward in forwards]
    with watch(cached) as seen:
        inputs = calibrate(layers, union, model.groups, steps, rules).input_amax
        if union.needs_data and not union.measured:
            run_rest(layers, steps)
    amaxes = calibrate_kv_cache(cached, union, model.groups, seen)
    off = [
        Fitted(layer.module, attribute, quantizer)
        for layer in layers
        for attribute, quantizer in _quantizers(layer)
    ]
    for quantizer in (q for parts in (layers, cached) for part in parts for q in part.quantizers):
        quantizer.disable()
    by_candidate = {}
    for name, plan in candidates.plans.items():
        by_candidate[name] = _fit(model, plan, scales, inputs)
        for fitted in off:
            fitted.put()
    found = _places(model, candidates.problem, by_candidate)
    return [live_cache(p.place, cached, amaxes) if p.place.cached else p for p in found]


def _forced(
    model: LiveModel, layers: Sequence[QuantLayer], rules: InputRules, forward: Callable[[], object]
) -> None:
    """Run a forward whose experts are given as many tokens as ``rules`` say."""
    with forced_experts(model.chunks, layers, rules.expert_share):
        forward()


def _union(plans: Sequence[QuantPlan], kv_cache: str) -> QuantPlan:
    """Return a plan that quantizes what any of them does, and measures what any of them needs."""
    each = zip(*(plan.decisions for plan in plans), strict=True)
    chosen = (max(same, key=lambda d: (d.static, d.quantized)) for same in each)
    decisions = tuple(replace(d, algorithm="max") for d in chosen)
    return QuantPlan("the candidates", decisions, kv_cache)


def _quantizers(layer: QuantLayer) -> Iterator[tuple[str, nn.Module]]:
    yield "weight_quantizer", layer.weight_quantizer
    yield "input_quantizer", layer.input_quantizer


def _fit(
    model: LiveModel, plan: QuantPlan, scales: ExpertScales, inputs: Mapping[str, float]
) -> dict[str, tuple[Fitted, ...]]:
    """Return, by slot, the quantizers that a candidate gives. Collective."""

    def fitted() -> list[QuantLayer]:
        layers = []
        for number, chunk in enumerate(model.chunks):
            weights = [local.weight for local in model.local if local.chunk == number]
            layers += refit(chunk, plan, weights, scales)
        return layers

    layers = together(model.groups, fitted)
    calibrate_weights(layers, plan, model.groups)
    load_inputs(layers, plan, inputs)
    return {
        decision.slot.name: tuple(Fitted(layer.module, a, q) for a, q in _quantizers(layer))
        for layer in layers
        for decision in layer.decisions
    }


def _places(
    model: LiveModel,
    problem: Problem,
    by_candidate: Mapping[str, Mapping[str, tuple[Fitted, ...]]],
) -> list[LivePlace]:
    of_module = {m: place.name for place in problem.places for m in place.modules}
    held: dict[str, list[LocalParam]] = {place.name: [] for place in problem.places}
    for local in model.local:
        name = of_module.get(local.param.sources[0].module)
        if name is not None and len(local.param.shape) == 2:
            held[name].append(local)
    return [_place(model, place, held[place.name], by_candidate) for place in problem.places]


def _place(
    model: LiveModel,
    place: Place,
    held: Sequence[LocalParam],
    by_candidate: Mapping[str, Mapping[str, tuple[Fitted, ...]]],
) -> LivePlace:
    options = []
    for option in place.options:
        of_slot = by_candidate.get(option.candidates[0], {}) if option.rule.weights else {}
        fitted = (f for local in held for f in of_slot.get(local.param.name, ()))
        options.append(tuple({(id(f.module), f.attribute): f for f in fitted}.values()))
    return LivePlace(place, _scopes(model, held), tuple(options))


def _scopes(model: LiveModel, held: Sequence[LocalParam]) -> tuple[Scope, ...]:
    """Return the linears of a place; for experts and shared experts, the block of all of them."""
    found: dict[tuple[int, str], Scope] = {}
    first = mpu.get_tensor_model_parallel_rank() == 0
    for local in held:
        chunk = model.chunks[local.chunk]
        name, counted = local.weight.module, first or chunk.config.sequence_parallel
        block = next((b for b in _BLOCKS if b in local.name), "")
        if block == ".experts.":  # the layer's output: that of a rank's experts is a part of it
            name = local.name.partition(block)[0]
        elif block:
            name = local.name.partition(block)[0] + block.rstrip(".")
        elif local.param.parallel is Parallel.COLUMN:
            counted = True
        found[local.chunk, name] = Scope(chunk.get_submodule(name), name, counted)
    return tuple(found.values())
