"""Calibrate: bring statistics of the logical tensors into the quantizers of every rank.

The amax of a slot is the largest magnitude over all its shards and replicas. A forward shows the
layers' inputs. Experts of a layer share their input scale, and their weight scale unless it is per
expert: the largest of the layer's slots, which the merged vector holds on every rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import isfinite

import torch

from megatron_quant.calib.calibration_file import CalibrationFile, loaded_amaxes
from megatron_quant.calib.histogram import clip, histograms
from megatron_quant.calib.input_sums import Merged
from megatron_quant.calib.observe import observe
from megatron_quant.calib.search import find_block_scales, find_scales, find_tensor_scales
from megatron_quant.calib.squares import merged_squares, summed_squares
from megatron_quant.calib.sync import merge_max, merge_sum
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CalibrationError
from megatron_quant.folding import Fold
from megatron_quant.formats import amax
from megatron_quant.layers import QuantLayer
from megatron_quant.recipes import Decision, QuantPlan, accept_cold, check_reached, largest_shared


class ColdExperts(Enum):
    """The treatment of an expert that no calibration token reached."""

    ERROR = "error"
    LAYER_MAX = "layer-max"  # it takes the largest amax of the layer's experts


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """The results of calibration, by slot name; equal on every rank.

    Attributes:
        weight_amax: Amax of each weight alone, also where its layer's experts share the largest.
        input_amax: Amax of each weight's inputs, also where a percentile clips them.
        scaled_amax: The same after clipping at a percentile; input scales follow from it.
        tokens: Number of tokens that an expert was given, for each of its weights (empty for
            plans that measure nothing). Padding counts too.
        cold: Weights of experts that saw no token. Where their inputs have a static scale they took
            the layer's largest amax, and where squares or products count those of the whole layer.
        moments: Sum of the squares of each weight's inputs, if they count (imatrix and gptq).
        squares: Statistics of each channel of the inputs of this rank's layers but gptq's, by layer
            name.
        fold: What was folded into the weights of the whole model.
    """

    weight_amax: Mapping[str, float]
    input_amax: Mapping[str, float]
    scaled_amax: Mapping[str, float]
    tokens: Mapping[str, int]
    cold: tuple[str, ...]
    moments: Mapping[str, float] = field(default_factory=dict)
    squares: Mapping[str, Merged] = field(default_factory=dict, repr=False, compare=False)
    fold: Fold = field(default_factory=Fold, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class InputRules:
    """How input scales follow from what the forwards measured.

    Attributes:
        cold_experts: Treatment of an expert that no token reached.
        act_percentile: Percentage of a layer's input values that its scale covers; larger values
            are clipped. 100 clips nothing.
        token_replicas: Number of ranks that are given the same expert's tokens (the expert
            tensor-parallel size), so that the report counts each token once.
        loaded: Measurements of an earlier calibration; no forward runs then.
        counted: Number of this rank's batches whose tokens, squares and products count; those after
            them repeat batches, so that all ranks run equally many. None for all.
        expert_share: Share of a layer's experts that each token is given to while those are
            measured; None for the experts that the router chose.
    """

    cold_experts: ColdExperts = ColdExperts.ERROR
    act_percentile: float = 100.0
    token_replicas: int = 1
    loaded: CalibrationFile | None = None
    counted: int | None = None
    expert_share: float | None = None


DEFAULTS = InputRules()


def calibrate(
    layers: Sequence[QuantLayer],
    plan: QuantPlan,
    groups: Groups,
    forwards: Iterable[Callable[[], object]] = (),
    rules: InputRules = DEFAULTS,
    fold: "FoldWeights | None" = None,
) -> CalibrationReport:
    """Fill the quantizers of ``layers``; every rank of ``groups`` calls it.

    Args:
        layers: This rank's layers of the plan.
        plan: Decisions on every slot of the model.
        groups: This rank's groups.
        forwards: Functions that run one batch each through the model; used only if inputs are
            measured.
        rules: How the scales of inputs follow from what the forwards showed.
        fold: Folds factors into the weights, by what was measured; None where nothing is folded.

    Raises:
        CalibrationError: On every rank alike, for a weight or input that is not finite, a layer
            that no token reached, or a cold expert.

    Layers of gptq get the scales of their blocks, and their codes, from ``round_weights``.
    """
    weights = _merge_weights(layers, plan, groups)
    clips = rules.act_percentile < 100
    weighted = [x for x in layers if x.needs_channels and not x.rounds]
    with (
        histograms(layers if clips else ()) as seen,
        summed_squares(weighted, groups, rules.counted) as sums,
    ):
        if rules.loaded is None:
            inputs, tokens = _merge_inputs(layers, plan, groups, forwards, rules.counted)
        else:
            file = rules.loaded
            inputs, tokens = together(groups, lambda: _read_inputs(file, plan))
    scaled = inputs
    if clips and inputs:
        static = {name: value for name, value in inputs.items() if plan.by_name[name].static}
        scaled = inputs | clip(plan, static, seen, rules.act_percentile, groups)
    cold = _cold(plan, tokens, rules.cold_experts)
    squares: dict[str, Merged] = {}
    if any(d.needs_channels and not d.rounds for d in plan.quantized):
        squares = merged_squares(weighted, groups, sums, rules.loaded)
    folded = Fold()
    if fold is not None:
        folded = fold(squares)
        weights = _merge_weights(layers, plan, groups)
        scaled = scaled | _divided_inputs(layers, plan, squares, folded, groups)
    _load_weights(layers, plan, weights)
    load_inputs(layers, plan, scaled)
    find_tensor_scales(layers, plan, groups)
    others = [layer for layer in layers if not layer.rounds]
    weights_EK = {x.name: _divided(x, squares[x.name], folded) for x in weighted if x.weighted}
    find_block_scales(others, groups, weights_EK)
    replicas = 1 if rules.loaded else rules.token_replicas
    counts = {slot: count // replicas for slot, count in tokens.items()}
    return CalibrationReport(
        weight_amax=weights,
        input_amax=inputs,
        scaled_amax=scaled,
        tokens=counts,
        cold=cold,
        squares=squares,
        fold=folded,
    )


FoldWeights = Callable[[Mapping[str, Merged]], Fold]
"""Folds factors into the live weights by statistics by layer name. Collective."""


def _divided(layer: QuantLayer, found: Merged, fold: Fold) -> torch.Tensor:
    """Return the squares of the inputs, each divided by its factor: fp32 [E, K]."""
    rows = []
    for decision, squares_K in zip(layer.decisions, found.squares_EK, strict=True):
        factors = fold.inputs(f"{decision.slot.sources[0]}.weight")
        rows.append(
            squares_K if factors is None else squares_K / factors.to(squares_K.device).square()
        )
    return torch.stack(rows)


def _divided_inputs(
    layers: Sequence[QuantLayer],
    plan: QuantPlan,
    found: Mapping[str, Merged],
    fold: Fold,
    groups: Groups,
) -> dict[str, float]:
    """Return the largest inputs, each channel divided by its factor, by slot name. Collective."""
    own: dict[str, torch.Tensor] = {}
    for layer in layers:
        for index, decision in enumerate(layer.decisions):
            if decision.static and decision.needs_peaks:
                peaks_EK = found[layer.name].peaks
                assert peaks_EK is not None, "peaks are beside squares"
                factors = fold.inputs(f"{decision.slot.sources[0]}.weight")
                peaks_K = peaks_EK[index]
                divided = peaks_K if factors is None else peaks_K / factors.to(peaks_K.device)
                own[decision.slot.name] = divided.max()
    names = [d.slot.name for d in plan.quantized if d.static and d.needs_peaks]
    return merge_max(names, own, groups) if names else {}


def calibrate_weights(
    layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups
) -> dict[str, float]:
    """Fill the quantizers of weights, which needs no data; those of inputs stay untouched.

    Every rank of ``groups`` calls it. Returns the amax of each weight alone, by slot name.

    Args:
        layers: This rank's layers of the plan.
        plan: Decisions on every slot of the model.
        groups: This rank's groups.

    Raises:
        CalibrationError: On every rank alike, for a weight that is not finite.
    """
    weights = _merge_weights(layers, plan, groups)
    _load_weights(layers, plan, weights)
    find_scales(layers, plan, groups)
    return weights


def refresh_weights(layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups) -> None:
    """Do as :func:`calibrate_weights`, but keep the scales onto which gptq rounded."""
    free = [d for d in plan.decisions if not d.rounds]
    if any(d.quantized for d in free):
        others = replace(plan, decisions=tuple(free))
        calibrate_weights([layer for layer in layers if not layer.rounds], others, groups)


def _merge_weights(
    layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups
) -> dict[str, float]:
    slots = _names(plan.quantized)
    found = {
        decision.slot.name: amax(weight.detach())
        for layer in layers
        for decision, weight in zip(layer.decisions, layer.weights(), strict=True)
    }
    merged = merge_max(slots, found, groups)
    assert merged.keys() == set(slots), f"no rank holds {set(slots) - merged.keys()}"
    _check_finite("weight", merged)
    return merged


def _merge_inputs(
    layers: Sequence[QuantLayer],
    plan: QuantPlan,
    groups: Groups,
    forwards: Iterable[Callable[[], object]],
    counted: int | None,
) -> tuple[dict[str, float], dict[str, int]]:
    """Return input amaxes, and experts' token counts; both empty if no inputs are measured."""
    watched = plan.measured
    if not watched:
        return {}, {}
    observed = observe(layers, forwards, counted)
    inputs = merge_max(_names(watched), observed.input_amax, groups)
    experts = [d for d in watched if d.slot.expert is not None]
    tokens = merge_sum(_names(experts), observed.tokens, groups) if experts else {}
    _check_finite("input of", inputs)
    check_reached((d.slot for d in watched), largest_shared(plan, inputs))
    return inputs, tokens


def _read_inputs(file: CalibrationFile, plan: QuantPlan) -> tuple[dict[str, float], dict[str, int]]:
    """Return what :func:`_merge_inputs` does, from an earlier run's measurements."""
    watched = plan.measured
    inputs = loaded_amaxes(file, watched)
    tokens = {}
    for slot in (d.slot for d in watched if d.slot.expert is not None):
        found = file.tokens(slot.sources)
        tokens[slot.name] = int(slot.name in inputs) if found is None else found
    return inputs, tokens


def _cold(plan: QuantPlan, tokens: Mapping[str, int], how: ColdExperts) -> tuple[str, ...]:
    """Return the weights of experts without a token; refuse those whose inputs need a scale."""
    unseen = [plan.by_name[name] for name, count in tokens.items() if not count]
    accept_cold((d.slot for d in unseen if d.static), how is ColdExperts.LAYER_MAX)
    return tuple(d.slot.name for d in unseen)


def _names(decisions: Iterable[Decision]) -> list[str]:
    return [d.slot.name for d in decisions]


def _check_finite(what: str, amaxes: Mapping[str, float]) -> None:
    for slot, value in amaxes.items():
        if not isfinite(value):
            raise CalibrationError(
                f"{what} {slot} contains NaN or Inf: repair the checkpoint, or exclude the weight"
            )


def _load_weights(
    layers: Sequence[QuantLayer], plan: QuantPlan, weights: Mapping[str, float]
) -> None:
    shared_weights = largest_shared(plan, weights)
    for layer in layers:
        weight_amax = torch.tensor(shared_weights[layer.sharing])
        if layer.per_expert:
            own = [weights[name] for name in _names(layer.decisions)]
            weight_amax = torch.tensor(own).view(-1, 1, 1)
        layer.weight_quantizer.amax = weight_amax.to(layer.weights()[0].device)


def load_inputs(layers: Sequence[QuantLayer], plan: QuantPlan, inputs: Mapping[str, float]) -> None:
    """Give the quantizers of static inputs their amax.

    Args:
        layers: This rank's layers of the plan.
        plan: Decisions on every slot of the model.
        inputs: Amax of inputs by slot name; slots that share a scale take the largest of theirs.
    """
    shared_inputs = largest_shared(plan, inputs)
    for layer in layers:
        if layer.static_inputs:
            amax = torch.tensor(shared_inputs[layer.sharing])
            layer.input_quantizer.amax = amax.to(layer.weights()[0].device)
