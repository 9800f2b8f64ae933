"""Round what a transformers model caches, keys after their rotation and values, as engines do."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from megatron_quant.ckpt.read import CacheScales
from megatron_quant.formats import fake_quant, get_format

_CACHED, _ONE = get_format("fp8"), torch.ones(())


class RoundedCache(DynamicCache):
    """A cache in FP8.

    Args:
        model: The model, for the kinds of its layers.
        scales: Scales of layers; others are cached as they are. None casts all with scale 1.
    """

    def __init__(self, model: PreTrainedModel, scales: CacheScales | None) -> None:
        super().__init__(config=model.config)
        self._scales = scales

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any
    ) -> Any:
        """Round keys and values [B, heads, S, D], and cache them."""
        own = (None, None) if self._scales is None else self._scales.get(layer_idx)
        if own is not None:
            key_states, value_states = map(round_cached, (key_states, value_states), own)
        return super().update(key_states, value_states, layer_idx, *rest)


def round_cached(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Round keys or values to FP8 with ``scale``, fp32 []; with 1 if None."""
    return fake_quant(x.contiguous(), _CACHED, (_ONE if scale is None else scale).to(x.device))
