"""Show each token to more experts than the router chose, to measure the experts' inputs alone.

A stack of experts runs twice: first with every token given to the experts of its largest scores,
the chosen ones among them, and that is measured; then as ever, and nothing is. The first output is
dropped. So what follows sees the same hidden states as without.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor, nn

from megatron_quant.errors import CalibrationError
from megatron_quant.streaming.observe import WeightInputAmax

_ROUTERS = ("gate", "router")


@contextmanager
def forced_experts(module: nn.Module, share: float | None, mode: WeightInputAmax) -> Iterator[None]:
    """Give each token to this share of the experts of every layer in ``module``.

    Args:
        module: A layer, or a model.
        share: The share; None for the experts that the router chose.
        mode: What measures.

    Raises:
        CalibrationError: For experts that cannot be called with other tokens.
    """
    with ExitStack() as stack:
        for name, block in module.named_modules():
            experts = getattr(block, "experts", None)
            if share is not None and isinstance(experts, nn.Module):
                at = f"{name}.experts".removeprefix(".")
                stack.enter_context(_forced(block, experts, share, mode, at))
        yield


@contextmanager
def _forced(
    block: nn.Module, experts: nn.Module, share: float, mode: WeightInputAmax, name: str
) -> Iterator[None]:
    stacks = [p for p in experts.parameters(recurse=False) if p.dim() == 3]
    if not stacks:
        raise _refused(name, "are no stack of weights")
    forward, count = experts.forward, len(stacks[0])
    scores: list[Tensor] = []
    hook = None if share == 1 else _router(block, count, name).register_forward_hook(_keep(scores))

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if len(given) != 3 or given[1].dtype != torch.int64 or given[1].dim() != 2:
            raise _refused(name, "are not called with hidden states, indices and weights")
        x_TK, index_TC, weights = given
        more = _more(index_TC, count, share, scores)
        width = count if weights.shape[-1] == count else more.shape[1]
        forward(x_TK, more, weights.new_ones(len(x_TK), width))
        with mode.deaf():
            return forward(*args, **kwargs)

    experts.__dict__["forward"] = run
    try:
        yield
    finally:
        del experts.__dict__["forward"]
        if hook is not None:
            hook.remove()


def _more(index_TC: Tensor, count: int, share: float, scores: list[Tensor]) -> Tensor:
    """Return the experts that each token is given to: int64 [T, n]."""
    tokens, chosen = index_TC.shape
    most = max(chosen, ceil(share * count))
    order_TE = index_TC.new_zeros(tokens, count + 1).float()  # the last one stands for no expert
    if share < 1:
        order_TE[:, :count] = scores.pop().reshape(tokens, count).float()
    order_TE.scatter_(1, index_TC, inf)
    return order_TE[:, :count].topk(min(most, count), -1).indices


def _keep(scores: list[Tensor]) -> Callable[..., None]:
    def hook(router: nn.Module, args: Any, output: Any) -> None:
        scores.clear()
        scores.append(output[0] if isinstance(output, tuple) else output)

    return hook


def _router(block: nn.Module, count: int, name: str) -> nn.Module:
    """Return the module whose (first) output is a score for each of ``count`` experts."""
    for at, module in block.named_modules():
        if any(word in at for word in _ROUTERS) and "expert" not in at:
            for weight in module.parameters(recurse=False):
                if weight.dim() == 2 and len(weight) == count:
                    found: nn.Module = module
                    return found
    raise _refused(name, "have no router that scores them")


def _refused(name: str, said: str) -> CalibrationError:
    return CalibrationError(
        f"--calib-experts: {name} of transformers' model {said}, so they cannot be given other "
        "tokens; take --calib-experts routed"
    )
