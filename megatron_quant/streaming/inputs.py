"""Merge input amaxes of all slots from every rank's observations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from megatron_quant.dist import Groups, max_reduce, sum_reduce
from megatron_quant.errors import CalibrationError
from megatron_quant.models import Param
from megatron_quant.recipes import Decision, QuantPlan, accept_cold, check_reached, largest_shared

_LAYER_MAX = "layer-max"


@dataclass(frozen=True)
class InputAmaxes:
    """Input amaxes of a plan's slots.

    Attributes:
        found: Amax of each slot that was reached.
        scales: Amax that each static scale follows from, fp32 []: a layer's experts share the
            largest.
        cold: Slots of experts that no token reached.
    """

    found: Mapping[str, float]
    scales: Mapping[str, torch.Tensor]
    cold: tuple[str, ...]


def static_inputs(quant: QuantPlan, params: Sequence[Param]) -> list[Param]:
    """Return the parameters whose inputs have a tensor scale."""
    decisions = [(p, quant.by_name[p.name]) for p in params]
    return [p for p, decision in decisions if decision.static and not decision.carried]


def with_carried(
    amaxes: Mapping[str, torch.Tensor], quant: QuantPlan
) -> Mapping[str, torch.Tensor]:
    """Add amaxes of the inputs of experts that no forward runs: those of layers for speculation.

    Each gets the largest of the same linear in other experts, as ModelOpt does.
    """
    found = dict(amaxes)
    for decision in (d for d in quant.quantized if d.carried and d.static):
        linear = _linears(decision)
        others = [amaxes[d.slot.name] for d in quant.measured if linear <= _linears(d)]
        found[decision.slot.name] = torch.stack(others).amax()
    return found


def _linears(decision: Decision) -> set[str]:
    return {module.rpartition(".")[2] for module in decision.slot.sources}


def merge_tokens(
    params: Sequence[Param],
    keys_of: Callable[[Param], tuple[str, ...]],
    seen: Mapping[str, int],
    groups: Groups,
) -> dict[str, int]:
    """Return the tokens that each expert was given, by slot, over all ranks. One collective.

    Args:
        params: Parameters; those that are no expert's are left out.
        keys_of: Maps a parameter to its keys in ``seen``.
        seen: This rank's counts by key.
        groups: This rank's groups.
    """
    experts = [param for param in params if param.expert is not None]
    own = torch.tensor([sum(seen.get(key, 0) for key in keys_of(p)) for p in experts])
    merged = sum_reduce(own.long(), groups).tolist() if experts else []
    return {param.name: count for param, count in zip(experts, merged, strict=True)}


def merge_amaxes(
    quant: QuantPlan,
    params: Sequence[Param],
    keys_of: Callable[[Param], tuple[str, ...]],
    seen: Mapping[str, torch.Tensor],
    cold_experts: str,
    groups: Groups,
) -> InputAmaxes:
    """Merge every rank's observations in one collective.

    Args:
        quant: The resolved recipe.
        params: Result of :func:`static_inputs`.
        keys_of: Maps a parameter to its keys in ``seen``.
        seen: This rank's amaxes by key.
        cold_experts: ``layer-max`` to let an unreached expert take its layer's largest amax.
        groups: This rank's groups.

    Raises:
        CalibrationError: On every rank, for inputs that are not finite, a layer that no token
            reached, or, unless ``cold_experts`` is layer-max, an unreached expert.
    """
    row = torch.full((len(params),), -1.0)
    for i, param in enumerate(params):
        values = [seen[key] for key in keys_of(param) if key in seen]
        if values:
            row[i] = torch.stack(values).max().nan_to_num(nan=torch.inf)
    merged = dict(zip(params, max_reduce(row, groups).tolist(), strict=True))
    # Zeros alone reach experts whose tokens go to others, but also those of a layer without values.
    alive = {quant.by_name[p.name].slot.module for p, value in merged.items() if value > 0}
    found = {
        p.name: value
        for p, value in merged.items()
        if value > 0
        or (value == 0 and (p.expert is None or quant.by_name[p.name].slot.module not in alive))
    }
    for name, value in found.items():
        if not isfinite(value):
            raise CalibrationError(f"input of {name} contains NaN or Inf: repair the checkpoint")
    slots, largest = [quant.by_name[p.name].slot for p in params], largest_shared(quant, found)
    check_reached(slots, largest)
    unseen = (slot for slot in slots if slot.name not in found)
    cold = accept_cold(unseen, cold_experts == _LAYER_MAX)
    scales = {slot.name: torch.tensor(largest[slot.sharing]) for slot in slots}
    return InputAmaxes(found, scales, cold)
