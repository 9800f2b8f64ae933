"""Quantized values in the place of a weight, for those who read more of it than its values.

Transformer Engine and Megatron-Core add a weight's gradient to the buffer ``main_grad`` where
``fuse_wgrad_accumulation`` is on, and say so to Megatron's DistributedDataParallel by a flag on the
weight. Both look for them on the tensor that was multiplied.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def stand_in(values: Tensor, weight: Tensor) -> Tensor:
    """``values``, which share the attributes of ``weight`` from now on.

    All of them, in both directions: what a backward sets on one, the other has.
    """
    values.__dict__ = weight.__dict__
    return values


def follow(quantizer: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Let the quantizer's output stand in for its input; a forward hook of weight quantizers."""
    if output is not args[0]:
        stand_in(output, args[0])


class _StackedStraightThrough(torch.autograd.Function):
    """Quantizes weights as one stack, and hands each gradient to its weight as it is.

    Gradients that are placeholders, because the real ones went to ``main_grad``, are not copied.
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
    """One for each of ``weights`` [N, K]; ``quantize`` takes them stacked, [E, N, K].

    Its gradient must be that of the identity, as our codecs' is.
    """
    values = _StackedStraightThrough.apply(quantize, *weights)
    return [stand_in(v, w) for v, w in zip(values, weights, strict=True)]
