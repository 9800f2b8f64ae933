"""Quantizers of cached keys and values, on the attention that ModelOpt's registry converts.

Its ``k_bmm_quantizer`` and ``v_bmm_quantizer`` see what an engine caches: rotated keys, and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from megatron_quant.errors import CoverageError
from megatron_quant.formats import get_format
from megatron_quant.layers.backend import quantizer_attributes
from megatron_quant.layers.install import LocalWeight
from megatron_quant.recipes import CAST_AMAX, CacheSlot, QuantPlan, attention_of, cache_slots

_CACHED = get_format("fp8")


@dataclass(frozen=True)
class CachedTensor:
    """The quantizer of one attention's keys or values, for the heads on this rank.

    device: where its amax lives.
    """

    slot: CacheSlot
    quantizer: TensorQuantizer
    device: torch.device

    @property
    def quantizers(self) -> tuple[TensorQuantizer, ...]:
        """Return the quantizers that a forward calls, like :attr:`QuantLayer.quantizers`."""
        return (self.quantizer,)

    def set_amax(self, amax: float) -> None:
        """Set the largest magnitude of all heads' keys or values."""
        self.quantizer.amax = torch.tensor(amax, dtype=torch.float32, device=self.device)

    def amax(self) -> torch.Tensor:
        """Return the amax that :meth:`set_amax` set, fp32 []."""
        amax: torch.Tensor = self.quantizer.amax
        return amax.float().reshape(())


def attach_kv_cache(
    model: nn.Module, plan: QuantPlan, weights: Sequence[LocalWeight]
) -> list[CachedTensor]:
    """Turn on the quantizers that ``plan.kv_cache`` asks for. Call it after :func:`attach`.

    weights: this rank's share of the plan's slots. Raises CoverageError for an attention without
    such quantizers.
    """
    device = next(model.parameters()).device
    slots: dict[str, list[CacheSlot]] = {}
    for slot in cache_slots(plan):
        slots.setdefault(slot.attention, []).append(slot)
    cached = [
        CachedTensor(slot, _quantizer(model, weight, slot), device)
        for weight in weights
        for slot in slots.get(attention_of(plan.by_name[weight.slot].slot) or "", ())
    ]
    for tensor in cached:
        tensor.quantizer.set_from_attribute_config(quantizer_attributes(_CACHED))
        if plan.kv_cache == "fp8_cast":
            tensor.set_amax(CAST_AMAX)
    return cached


def _quantizer(model: nn.Module, weight: LocalWeight, slot: CacheSlot) -> TensorQuantizer:
    """Return the quantizer of the attention that the projection ``weight`` belongs to."""
    name = f"{weight.module.rpartition('.')[0]}.core_attention"
    module = model.get_submodule(name)
    quantizer = getattr(module, f"{slot.part}_bmm_quantizer", None)
    if quantizer is None:
        raise CoverageError(
            f"{name} is a {type(module).__name__}, which has no quantizer of its "
            f"{slot.part} cache: build the model with the Transformer Engine layer spec, or export "
            "with --export-kv-cache-quant none"
        )
    return quantizer
