"""Round what a transformers model caches, keys after their rotation and values, as engines do."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from megatron_quant.formats import amax, fake_quant, get_format, tensor_scale
from megatron_quant.recipes import CAST_AMAX

_CACHED = get_format("fp8")
Amaxes = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> amaxes of its keys and values, fp32 []."""


class MeasuredCache(DynamicCache):
    """A cache that keeps the largest magnitudes of what it is given.

    Args:
        model: The model, for the kinds of its layers.
        found: Amaxes by layer, which grow.
    """

    def __init__(
        self, model: PreTrainedModel, found: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        super().__init__(config=model.config)
        self._found = found

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any
    ) -> Any:
        """Measure keys and values [B, heads, S, D], and cache them."""
        k, v = amax(key_states), amax(value_states)
        before = self._found.get(layer_idx, (k, v))
        self._found[layer_idx] = (torch.maximum(before[0], k), torch.maximum(before[1], v))
        return super().update(key_states, value_states, layer_idx, *rest)


class RoundedCache(DynamicCache):
    """A cache in FP8.

    Args:
        model: The model, for the kinds of its layers.
        amaxes: Amaxes of each layer; None casts with scale 1.
    """

    def __init__(self, model: PreTrainedModel, amaxes: Amaxes | None) -> None:
        super().__init__(config=model.config)
        self._amaxes = amaxes

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any
    ) -> Any:
        """Round keys and values [B, heads, S, D], and cache them."""
        if self._amaxes is None:
            return super().update(cast(key_states), cast(value_states), layer_idx, *rest)
        k, v = self._amaxes[layer_idx]
        return super().update(_rounded(key_states, k), _rounded(value_states, v), layer_idx, *rest)


def cast(x: torch.Tensor) -> torch.Tensor:
    """Round as ``fp8_cast`` does, with scale 1."""
    return _rounded(x, torch.tensor(CAST_AMAX, device=x.device))


def _rounded(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return fake_quant(x.contiguous(), _CACHED, tensor_scale(largest, _CACHED))
