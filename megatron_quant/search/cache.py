"""Round what a transformers model caches, keys after their rotation and values, as engines do."""

from collections.abc import Mapping, Sequence
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

    The score is the sum of (gradient of a cached value x its change in FP8)^2.

    Args:
        model: The model, for the kinds of its layers.
        amaxes: For each score, those of :class:`RoundedCache`.
        found: The scores, fp64 [scores], which grow.
    """

    def __init__(
        self, model: PreTrainedModel, amaxes: Sequence[Amaxes | None], found: torch.Tensor
    ) -> None:
        super().__init__(config=model.config)
        self._amaxes, self._found = amaxes, found

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any
    ) -> Any:
        """Watch keys and values [B, heads, S, D], and cache them as they are."""
        for part, x in enumerate((key_states, value_states)):
            if x.requires_grad:
                largest = [None if each is None else each[layer_idx][part] for each in self._amaxes]
                x.register_hook(partial(self._add, x.detach(), largest))
        return super().update(key_states, value_states, layer_idx, *rest)

    def _add(
        self, x: torch.Tensor, largest: Sequence[torch.Tensor | None], gradient: torch.Tensor
    ) -> None:
        for i, amax in enumerate(largest):
            change = (_cast(x) if amax is None else _rounded(x, amax)).float() - x.float()
            score = (gradient.float() * change).square().sum(dtype=torch.float64)
            self._found[i] += score.cpu()


def _cast(x: torch.Tensor) -> torch.Tensor:
    """Round as ``fp8_cast`` does, with scale 1."""
    return _rounded(x, torch.tensor(CAST_AMAX, device=x.device))


def _rounded(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return fake_quant(x.contiguous(), _CACHED, tensor_scale(largest, _CACHED))
