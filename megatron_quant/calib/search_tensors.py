"""Find the scales of least error for tensors without blocks, over all who share them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_quant.calib.blocks import shards_of, stacked
from megatron_quant.dist import Groups, max_reduce, sum_reduce
from megatron_quant.formats import MSE_MULTIPLIERS, choose, errors
from megatron_quant.layers import QuantLayer
from megatron_quant.recipes import Decision, QuantPlan


def search_tensors(layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups) -> None:
    """Replace the amaxes of tensors without blocks by those of least error.

    Three collectives at most; every rank of ``groups`` calls it.
    """
    searched = [d for d in plan.quantized if d.searches_tensor]
    if not searched:
        return
    own = [layer for layer in layers if layer.decisions[0].searches_tensor]
    sums = _of_all_slots(searched, own, groups)
    sharing: dict[str, list[Tensor]] = {}
    for decision in searched:
        sharing.setdefault(decision.slot.sharing, []).append(sums[decision.slot.name])
    for layer in own:
        if layer.per_expert:
            _choose_amax(layer, torch.stack([sums[d.slot.name] for d in layer.decisions], 1))
        else:
            _choose_amax(layer, torch.stack(sharing[layer.sharing], 1).sum(1, keepdim=True))


def _of_all_slots(
    searched: Sequence[Decision], own: Sequence[QuantLayer], groups: Groups
) -> dict[str, Tensor]:
    """Return the errors of each slot's whole tensor, int64 [M] on the CPU, on every rank."""
    found: dict[str, Tensor] = {}
    for experts in (False, True):
        found |= _of_domain([layer for layer in own if layer.grouped is experts], groups, experts)
    rows = torch.full((len(searched), len(MSE_MULTIPLIERS)), -1, dtype=torch.int64)
    for i, decision in enumerate(searched):
        if decision.slot.name in found:
            rows[i] = found[decision.slot.name]
    # Ranks that have a slot agree on it; the others learn it.
    names = (decision.slot.name for decision in searched)
    return dict(zip(names, max_reduce(rows, groups), strict=True))


def _of_domain(layers: Sequence[QuantLayer], groups: Groups, experts: bool) -> dict[str, Tensor]:
    if not layers:
        return {}
    names = [d.slot.name for layer in layers for d in layer.decisions]
    rows = torch.cat([_of_layer(layer) for layer in layers])
    if groups.shards is not None:
        rows = sum_reduce(rows, shards_of(groups, experts))
    return dict(zip(names, rows, strict=True))


def _of_layer(layer: QuantLayer) -> Tensor:
    """Return this shard's errors of each weight, int64 [E, M] on the CPU."""
    w_ENK = stacked(layer)
    amax = layer.amax_of_stack().expand(len(w_ENK), 1, 1)
    sums = errors(w_ENK, layer.weight_format, None, amax, MSE_MULTIPLIERS)
    return sums.view(len(MSE_MULTIPLIERS), -1).t().cpu()


def _choose_amax(layer: QuantLayer, errors_ME: Tensor) -> None:
    """Replace the amaxes of the layer's quantizer (one, or one an expert) by the best ones.

    errors_ME: errors of each multiple of each amax.
    """
    quantizer = layer.weight_quantizer
    chosen = choose(errors_ME, MSE_MULTIPLIERS).to(quantizer.amax.device)
    quantizer.amax = quantizer.amax * chosen.view(quantizer.amax.shape)
