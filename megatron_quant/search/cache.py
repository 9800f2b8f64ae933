"""Round what a transformers model caches, keys after their rotation and values, as engines do."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from megatron_quant.formats import fake_quant, get_format, tensor_scale
from megatron_quant.recipes import CAST_AMAX

_CACHED = get_format("fp8")
Amaxes = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> amaxes of its keys and values, fp32 []."""


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
            return super().update(_cast(key_states), _cast(value_states), layer_idx, *rest)
        k, v = self._amaxes[layer_idx]
        return super().update(_rounded(key_states, k), _rounded(value_states, v), layer_idx, *rest)


class WatchedCache(DynamicCache):
    """A cache that waits for the gradients of what it holds, and then adds to its score.

    The score is the sum of (gradient of a cached value x its change by a cast to FP8)^2.

    Args:
        model: The model, for the kinds of its layers.
        found: The score, fp64 [], which grows.
    """

    def __init__(self, model: PreTrainedModel, found: torch.Tensor) -> None:
        super().__init__(config=model.config)
        self._found = found

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any
    ) -> Any:
        """Watch keys and values [B, heads, S, D], and cache them as they are."""
        for x in (key_states, value_states):
            if x.requires_grad:
                x.register_hook(partial(self._add, x.detach()))
        return super().update(key_states, value_states, layer_idx, *rest)

    def _add(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        change = _cast(x).float() - x.float()
        self._found += (gradient.float() * change).square().sum(dtype=torch.float64).cpu()


def _cast(x: torch.Tensor) -> torch.Tensor:
    """Round as ``fp8_cast`` does, with scale 1."""
    return _rounded(x, torch.tensor(CAST_AMAX, device=x.device))


def _rounded(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return fake_quant(x.contiguous(), _CACHED, tensor_scale(largest, _CACHED))
