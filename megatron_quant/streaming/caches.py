"""Measure the keys and values that a decoder layer of transformers would cache."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megatron_quant.formats import amax
from megatron_quant.models import Param
from megatron_quant.recipes import QuantPlan, attention_of, cache_slots


class CacheAmax:
    """Stands for the cache in a layer's call; keeps nothing but the largest magnitudes.

    Attributes:
        found: Amax by cache slot, fp32 []; they grow.
    """

    def __init__(self, slots: Sequence[str], layer: int) -> None:
        """Measure what decoder layer ``layer`` caches: the slots of its keys and values."""
        self._slots, self._layer = slots, layer
        self.found: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure keys and values [B, heads, S, D] as they are cached, and return them."""
        assert layer_idx == self._layer, f"layer {self._layer} caches as layer {layer_idx}"
        for slot, states in zip(self._slots, (key_states, value_states), strict=True):
            largest = amax(states)
            self.found[slot] = torch.maximum(self.found.get(slot, largest), largest)
        return key_states, value_states


def calibrated_caches(quant: QuantPlan, params: Iterable[Param]) -> dict[int, list[str]]:
    """Map each layer that caches keys and values by calibrated scales to their cache slots."""
    if quant.kv_cache != "fp8":
        return {}
    slots: dict[str, list[str]] = {}
    for slot in cache_slots(quant):
        slots.setdefault(slot.attention, []).append(slot.name)
    found: dict[int, list[str]] = {}
    for param in params:
        attention = attention_of(quant.by_name[param.name].slot)
        if attention in slots and param.layer is not None:
            found[param.layer] = slots[attention]
    return found
