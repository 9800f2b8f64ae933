"""Show each token to more experts than the router chose, to measure the experts' inputs alone.

A MoE layer runs twice: first with every token given to the experts of its largest logits, the
chosen ones among them, and only experts are measured; then as ever, and everything else is. The
first output is dropped. So what follows sees the same hidden states as without.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil, inf
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_quant.calib import deaf
from megatron_quant.errors import CalibrationError
from megatron_quant.layers import QuantLayer

_DISPATCHERS = ("allgather", "alltoall")


@contextmanager
def forced_experts(
    chunks: Sequence[Any], layers: Sequence[QuantLayer], share: float | None
) -> Iterator[None]:
    """Give each token to this share of a layer's experts; those of the router alone if None.

    Raises CalibrationError for a dispatcher that drops tokens, or counts them by itself.
    """
    found = [m for chunk in chunks for m in chunk.modules() if isinstance(m, MoELayer)]
    experts = [layer for layer in layers if layer.grouped]
    if share is None or not found or not any(layer.measured for layer in experts):
        yield
        return
    for moe in found:
        _check(moe.config)
    before = [vars(moe).get("forward") for moe in found]
    others = [layer for layer in layers if not layer.grouped]
    for moe in found:
        vars(moe)["forward"] = _twice(moe, moe.forward, experts, others, share)
    try:
        yield
    finally:
        for moe, own in zip(found, before, strict=True):
            _put_back(moe, own)


def _check(config: Any) -> None:
    kind, factor = config.moe_token_dispatcher_type, config.moe_expert_capacity_factor
    if kind not in _DISPATCHERS or factor is not None:
        said = f"drops tokens (moe_expert_capacity_factor={factor})"
        if kind not in _DISPATCHERS:
            said = f"has moe_token_dispatcher_type={kind!r}"
        raise CalibrationError(
            f"--calib-experts gives tokens to other experts than the router's, and the model {said}"
            ": calibrate with alltoall and without a capacity, or take --calib-experts routed"
        )


def _twice(
    moe: Any,
    forward: Callable[..., Any],
    experts: Sequence[QuantLayer],
    others: Sequence[QuantLayer],
    share: float,
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with deaf(others), _routed_to_more(moe, share):
            forward(*args, **kwargs)
        with deaf(experts):
            return forward(*args, **kwargs)

    return run


@contextmanager
def _routed_to_more(moe: Any, share: float) -> Iterator[None]:
    router, config = moe.router, moe.token_dispatcher.config
    forward, gating, topk = router.forward, router.gating, config.moe_router_topk
    before, logits = [vars(router).get(n) for n in ("forward", "gating")], []

    def kept(*args: Any, **kwargs: Any) -> Any:
        logits.append(gating(*args, **kwargs))
        return logits[-1]

    def more(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs_TE, chosen_TE = forward(*args, **kwargs)
        count = max(topk, ceil(share * chosen_TE.shape[1]))
        config.moe_router_topk = count  # a dispatcher's buffers are of this size
        order_TE = logits.pop().view(chosen_TE.shape).float().masked_fill(chosen_TE, inf)
        given_TE = torch.zeros_like(chosen_TE).scatter_(1, order_TE.topk(count, -1).indices, True)
        return probs_TE.masked_fill(given_TE & ~chosen_TE, 1.0), given_TE

    vars(router).update(forward=more, gating=kept)
    try:
        yield
    finally:
        config.moe_router_topk = topk
        for name, own in zip(("forward", "gating"), before, strict=True):
            _put_back(router, own, name)


def _put_back(module: Any, own: Any, name: str = "forward") -> None:
    """Restore an attribute that the instance had itself, or had not."""
    if own is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = own
