"""Watch a forward for every layer's largest input, and the tokens of every expert."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_quant.calib.hearing import hear
from megatron_quant.formats import amax
from megatron_quant.layers import CachedTensor, QuantGroupedLinear, QuantLayer


class InputAmax:
    """Running amax over the inputs of a quantizer: fp32 [], None until it saw a token."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Update the amax; a forward pre-hook of the input quantizer."""
        if args[0].numel():
            seen = amax(args[0])
            self.value = seen if self.value is None else torch.maximum(self.value, seen)


class TokenCount:
    """Tokens that each local expert of a grouped linear was given, int64 [E]."""

    def __init__(self, num_experts: int, most: int | None = None) -> None:
        """Count in the first ``most`` forwards; in all of them if None."""
        self.tokens = torch.zeros(num_experts, dtype=torch.int64)
        self._left = most

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Count tokens; a forward pre-hook of the linear, whose arguments are ``(x, m_splits)``."""
        if self._left is not None:
            if self._left == 0:
                return
            self._left -= 1
        self.tokens += torch.as_tensor(args[1]).cpu()


@dataclass(frozen=True)
class Observed:
    """One rank's observations of its layers, by slot name; a slot that saw nothing has no amax."""

    input_amax: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]


def observe(
    layers: Sequence[QuantLayer],
    forwards: Iterable[Callable[[], object]],
    counted: int | None = None,
) -> Observed:
    """Run ``forwards`` with the model unquantized and the inputs that matter watched.

    Args:
        layers: The layers to watch.
        forwards: Functions that run batches.
        counted: Number of batches whose tokens count; None for all.
    """
    watched = [layer for layer in layers if layer.measured]
    grouped = [layer for layer in watched if isinstance(layer.module, QuantGroupedLinear)]
    inputs = [(layer, InputAmax()) for layer in watched]
    counts = [(layer, TokenCount(len(layer.decisions), counted)) for layer in grouped]
    hooks = [hear(x.input_quantizer, hook) for x, hook in inputs]
    hooks += [hear(x.module, count) for x, count in counts]
    try:
        with torch.no_grad(), unquantized(layers):
            for forward in forwards:
                forward()
    finally:
        for hook in hooks:
            hook.remove()
    return Observed(
        {d.slot.name: h.value for x, h in inputs if h.value is not None for d in x.decisions},
        {d.slot.name: n for x, c in counts for d, n in zip(x.decisions, c.tokens, strict=True)},
    )


@contextmanager
def unquantized(layers: Sequence[QuantLayer | CachedTensor]) -> Iterator[None]:
    """Let the model compute in its own precision while the context lasts.

    A layer still calls the quantizers that are off, so hooks on those see its inputs.
    """
    enabled = [q for layer in layers for q in layer.quantizers if q.is_enabled]
    for quantizer in enabled:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enable()
