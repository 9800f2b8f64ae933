"""Score the change of what a transformers model caches by its gradients."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from megatron_quant.ckpt.read import CacheScales
from megatron_quant.evaluation import round_cached


class WatchedCache(DynamicCache):
    """A cache that waits for the gradients of what it holds, and then adds to its score.

    The score is the sum of (gradient of a cached value x its change in FP8)^2.

    Args:
        model: The model, for the kinds of its layers.
        scales: For each score, the scales of all layers; None for a cast with scale 1.
        found: The scores, fp64 [scores], which grow.
    """

    def __init__(
        self, model: PreTrainedModel, scales: Sequence[CacheScales | None], found: torch.Tensor
    ) -> None:
        super().__init__(config=model.config)
        self._scales, self._found = scales, found

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any
    ) -> Any:
        """Watch keys and values [B, heads, S, D], and cache them as they are."""
        for part, x in enumerate((key_states, value_states)):
            if x.requires_grad:
                own = [None if each is None else each[layer_idx][part] for each in self._scales]
                x.register_hook(partial(self._add, x.detach(), own))
        return super().update(key_states, value_states, layer_idx, *rest)

    def _add(
        self, x: torch.Tensor, scales: Sequence[torch.Tensor | None], gradient: torch.Tensor
    ) -> None:
        for i, scale in enumerate(scales):
            change = round_cached(x, scale).float() - x.float()
            score = (gradient.float() * change).square().sum(dtype=torch.float64)
            self._found[i] += score.cpu()
