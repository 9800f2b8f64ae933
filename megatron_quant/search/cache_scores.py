"""Score the options of the KV cache on a batch, by either method."""

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from megatron_quant.evaluation import nll_and_kl
from megatron_quant.search.cache import RoundedCache, cast
from megatron_quant.search.loss import Loss, check_loss, check_score, next_token_loss
from megatron_quant.search.problem import Place
from megatron_quant.search.scoring import with_gradient

# All options that change something are fp8_cast: transformers' forward calibrates no cache scales.


def gradient_score(
    model: PreTrainedModel, place: Place, ids: torch.Tensor, loss: Loss = next_token_loss
) -> torch.Tensor:
    """Score by the sum of (gradient of a cached value x its change)^2, with one backward.

    Args:
        model: With a head, in evaluation mode, parameters without gradients.
        place: The place of the cache.
        ids: int64 [B, S].
        loss: That of the next token, or another.

    Returns:
        fp64 [options]; 0 for the one that leaves the cache as it is.

    Raises:
        CalibrationError: If the loss or a score is not finite.
    """
    found = torch.zeros((), dtype=torch.float64)
    handle = model.get_input_embeddings().register_forward_hook(with_gradient)
    try:
        with torch.enable_grad():
            value = loss(_logits(model, ids, _WatchedCache(model, found)).float(), ids)
            check_loss(value.item())
            value.backward()
    finally:
        handle.remove()
    return _scores("gradient", place, found.item())


def divergence_score(
    model: PreTrainedModel, place: Place, ids: torch.Tensor, loss: Loss = next_token_loss
) -> torch.Tensor:
    """Score by the KL divergence of the logits. Arguments and result as :func:`gradient_score`.

    It takes no loss.
    """
    with torch.no_grad():
        before = _logits(model, ids, DynamicCache(config=model.config)).flatten(0, 1)
        after = _logits(model, ids, RoundedCache(model, None)).flatten(0, 1)
    return _scores("kl_div", place, max(nll_and_kl(after, before, ids.flatten()).kl, 0.0))


CACHE_SCORERS = {"gradient": gradient_score, "kl_div": divergence_score}
"""Method -> its function."""


def _scores(method: str, place: Place, score: float) -> torch.Tensor:
    changed = [option for option in place.options if option.changes]
    for option in changed:
        check_score(method, score, place.name, option.action)
    return torch.tensor([score * o.changes for o in place.options], dtype=torch.float64)


def _logits(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return out


class _WatchedCache(DynamicCache):
    """A cache that waits for the gradients of what it holds, and then adds to its score.

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
        change = cast(x).float() - x.float()
        self._found += (gradient.float() * change).square().sum(dtype=torch.float64).cpu()
