"""Follow what layers hand to later ones beside the hidden states, such as keys and values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_quant.streaming import Call

_Tensors = tuple[torch.Tensor, ...]


@contextmanager
def lent(call: Call, own: dict[Any, _Tensors]) -> Iterator[None]:
    """Hand ``own`` to a layer, and keep there what it hands on, while the context lasts.

    Args:
        call: The layer's arguments; they are as they were afterwards.
        own: What layers before it have handed on, by key, where it differs from ``call``'s.
    """
    kept = [(taken, dict(taken)) for taken in call.handed]
    for taken, _ in kept:
        taken.update(own)
    yield
    for taken, values in kept:
        own.update({k: v for k, v in taken.items() if v is not own.get(k, values.get(k))})
        taken.update(values)


@dataclass
class Handed:
    """The gradients of what the layers of one batch hand on, in a backward through all of them.

    Attributes:
        gradients: Those of what layers have taken, by key, until the layer that made it is reached.
    """

    gradients: dict[Any, _Tensors] = field(default_factory=dict)

    def backward(
        self,
        call: Call,
        layer: torch.nn.Module,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        cache: Any = None,
    ) -> torch.Tensor:
        """Run a layer again and go back through it; return the gradient of what entered it.

        Args:
            call: Its arguments; what earlier layers handed to it is as the forward left it.
            layer: The layer.
            hidden: What entered it, [B, S, H].
            gradient: That of what it returned.
            cache: A KV cache that it fills; None for none.
        """
        kept = [(taken, dict(taken)) for taken in call.handed]
        leaves: dict[Any, _Tensors] = {}
        for taken, values in kept:
            taken.update({key: tuple(map(_leaf, ts)) for key, ts in values.items()})
            leaves |= taken
        hidden = hidden.detach().requires_grad_()
        try:
            out = [call.run(layer, hidden, cache)]
            gradients = [gradient]
            for key, made in _made(call, leaves):
                out += made
                gradients += self.gradients.pop(key, tuple(map(torch.zeros_like, made)))
            torch.autograd.backward(out, gradients)
        finally:
            for taken, values in kept:
                taken.update(values)
        for key, ts in leaves.items():
            self._add(key, tuple(t.grad for t in ts))
        assert hidden.grad is not None
        return hidden.grad

    def _add(self, key: Any, more: tuple[torch.Tensor | None, ...]) -> None:
        if any(g is None for g in more):
            return  # the layer took nothing of it
        own = tuple(g for g in more if g is not None)
        before = self.gradients.get(key)
        self.gradients[key] = (
            own if before is None else tuple(a + b for a, b in zip(before, own, strict=True))
        )


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _made(call: Call, leaves: Mapping[Any, _Tensors]) -> list[tuple[Any, _Tensors]]:
    """Return what a layer has handed on, by key."""
    return [
        (key, made)
        for taken in call.handed
        for key, made in taken.items()
        if made is not leaves.get(key)
    ]
