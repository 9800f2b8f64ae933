"""Attach quantizers to a live Megatron model, chunk by chunk."""

from megatron_quant.layers import CachedTensor, ExpertScales, QuantLayer, attach, attach_kv_cache
from megatron_quant.mcore.model.load import LiveModel
from megatron_quant.recipes import QuantPlan


def attach_model(
    model: LiveModel, plan: QuantPlan, expert_scales: ExpertScales = ExpertScales.SHARED
) -> tuple[list[QuantLayer], list[CachedTensor]]:
    """Convert this rank's chunks in place; return their quantized linears and caches.

    Raises CoverageError for a layer that cannot carry the quantizer that the plan asks.
    """
    layers: list[QuantLayer] = []
    cached: list[CachedTensor] = []
    for number, chunk in enumerate(model.chunks):
        held = (local for local in model.local if local.chunk == number)
        weights = [local.weight for local in held if not local.param.copy_of]
        layers += attach(chunk, plan, weights, expert_scales)
        cached += attach_kv_cache(chunk, plan, weights)
    return layers, cached
