"""Let quantized values stand in for a weight, attributes included.

With ``fuse_wgrad_accumulation``, Transformer Engine and Megatron-Core add a weight's gradient to
the buffer ``main_grad``, and tell Megatron's DistributedDataParallel by a flag on the weight. Both
look for buffer and flag on the tensor that was multiplied.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def stand_in(values: Tensor, weight: Tensor) -> Tensor:
    """Return ``values``, which share all attributes with ``weight`` from now on.

    They share in both directions: what a backward sets on one, the other has too.
    """
    values.__dict__ = weight.__dict__
    return values


def follow(quantizer: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Let the quantizer's output stand in for its input; a forward hook of weight quantizers."""
    if output is not args[0]:
        stand_in(output, args[0])


class _StackedStraightThrough(torch.autograd.Function):
    """Quantizes weights as one stack, and hands each gradient unchanged to its weight.

    Placeholder gradients, whose real ones went to ``main_grad``, are not copied.
    """

    @staticmethod
    def forward(
        ctx: Any, quantize: Callable[[Tensor], Tensor], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(quantize(torch.stack(weights)).unbind(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads


def stand_ins(weights: list[Tensor], quantize: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Make a stand-in for each of ``weights`` [N, K]; ``quantize`` takes them as [E, N, K].

    The gradient of ``quantize`` must be the identity's, as our codecs' is.
    """
    values = _StackedStraightThrough.apply(quantize, *weights)
    return [stand_in(v, w) for v, w in zip(values, weights, strict=True)]
