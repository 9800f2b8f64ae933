"""Max calibration: amaxes of the logical tensors into the quantizers of every rank.

The amax of a slot is the largest magnitude over all its shards and replicas. Layer inputs are
observed by a forward; what an expert layer's experts share (their input scale, and their weight
scale unless it is per expert) is the largest of the layer's slots, which the merged vector holds on
every rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from megatron_quant.calib.observe import Observed, observe
from megatron_quant.calib.sync import merge_max, merge_sum
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError
from megatron_quant.formats import amax
from megatron_quant.layers.grouped import QuantGroupedLinear
from megatron_quant.layers.install import QuantLayer
from megatron_quant.recipes.plan import Decision, QuantPlan


class ColdExperts(Enum):
    """What to do with an expert that no calibration token reached."""

    ERROR = "error"
    LAYER_MAX = "layer-max"  # it takes the largest amax of the layer's experts


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found, by slot name; equal on every rank.

    tokens: how many tokens an expert was given (empty for weight-only plans).
    cold: the experts that saw none and took the layer's largest amax.
    """

    weight_amax: Mapping[str, float]
    input_amax: Mapping[str, float]
    tokens: Mapping[str, int]
    cold: tuple[str, ...]


def calibrate(
    layers: Sequence[QuantLayer],
    plan: QuantPlan,
    groups: Groups,
    forwards: Iterable[Callable[[], None]] = (),
    cold_experts: ColdExperts = ColdExperts.ERROR,
    token_replicas: int = 1,
) -> CalibrationReport:
    """Fill the quantizers of ``layers``; every rank of ``groups`` calls it.

    forwards: each runs one batch through the model; used only where the plan quantizes inputs.
    token_replicas: how many ranks are given the same expert's tokens (the expert tensor-parallel
        size), so that the report counts each token once.
    Raises CalibrationError, on every rank alike, for a weight or input that is not finite, a layer
    that no token reached, or a cold expert.
    """
    slots = [d.slot.name for d in plan.quantized]
    observed = Observed({}, {})
    if any(d.inputs for d in plan.quantized):
        observed = observe(layers, forwards)
    weights, inputs = merge_max(slots, [_weight_amaxes(layers), observed.input_amax], groups)
    tokens = merge_sum(slots, observed.tokens, groups)
    _check_finite("weight", weights)
    _check_finite("input of", inputs)
    _check_complete(plan, weights, inputs)
    cold = _cold_experts(plan, tokens, cold_experts)
    _load(layers, plan, weights, inputs)
    counted = [d.slot.name for d in _observed_experts(plan)]
    return CalibrationReport(
        _numbers(weights),
        _numbers(inputs),
        {slot: int(tokens[slot]) // token_replicas for slot in counted},
        cold,
    )


def _observed_experts(plan: QuantPlan) -> list[Decision]:
    return [d for d in plan.quantized if d.inputs and d.slot.expert is not None]


def _weight_amaxes(layers: Sequence[QuantLayer]) -> dict[str, torch.Tensor]:
    found = {}
    for layer in layers:
        for decision, weight in zip(layer.decisions, layer.weights(), strict=True):
            found[decision.slot.name] = amax(weight.detach())
    return found


def _check_finite(what: str, values: Mapping[str, torch.Tensor]) -> None:
    for slot, value in values.items():
        if not torch.isfinite(value):
            raise CalibrationError(
                f"{what} {slot} contains NaN or Inf: repair the checkpoint, or exclude the weight"
            )


def _check_complete(
    plan: QuantPlan, weights: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> None:
    layers_seen = {plan.by_name[slot].slot.module for slot in inputs}
    for decision in plan.quantized:
        slot = decision.slot
        assert slot.name in weights, f"no rank holds {slot.name}"
        if decision.inputs and slot.module not in layers_seen:
            raise CalibrationError(
                f"no calibration token reached {slot.module}: give more data with --calib-size"
            )


def _cold_experts(
    plan: QuantPlan, tokens: Mapping[str, torch.Tensor], policy: ColdExperts
) -> tuple[str, ...]:
    cold = [d.slot for d in _observed_experts(plan) if not tokens[d.slot.name]]
    if cold and policy is ColdExperts.ERROR:
        raise CalibrationError(
            f"expert {cold[0].expert} of {cold[0].module} saw no calibration token"
            f"{f' ({len(cold) - 1} more experts too)' if len(cold) > 1 else ''}: raise "
            "--calib-size, or take the layer's largest amax with --cold-experts layer-max"
        )
    return tuple(slot.name for slot in cold)


def _load(
    layers: Sequence[QuantLayer],
    plan: QuantPlan,
    weights: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> None:
    shared_weights, shared_inputs = _module_max(plan, weights), _module_max(plan, inputs)
    for layer in layers:
        device = layer.weights()[0].device
        weight_amax = shared_weights[layer.name]
        if isinstance(layer.module, QuantGroupedLinear) and layer.module.per_expert:
            own = [weights[d.slot.name] for d in layer.decisions]
            weight_amax = torch.stack(own).view(-1, 1, 1)
        layer.module.weight_quantizer.amax = weight_amax.to(device)
        if layer.decisions[0].inputs:
            layer.module.input_quantizer.amax = shared_inputs[layer.name].to(device)


def _module_max(plan: QuantPlan, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The largest value of each module's slots: over all experts, whoever holds them."""
    largest: dict[str, torch.Tensor] = {}
    for slot, value in values.items():
        module = plan.by_name[slot].slot.module
        largest[module] = torch.maximum(largest.get(module, value), value)
    return largest


def _numbers(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {slot: float(value) for slot, value in values.items()}
