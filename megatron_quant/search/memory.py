"""The memory and disk that scoring layer by layer takes, from names and shapes alone."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from megatron_quant.models import CARRIED, Param, Role
from megatron_quant.search.divergence import streams_at_once
from megatron_quant.search.problem import Problem

_UNREAD = (*CARRIED, Role.CACHE)
"""Roles of parameters that no forward of the text decoder reads."""


@dataclass(frozen=True)
class ScoreMemory:
    """Bytes that scoring layer by layer takes.

    Attributes:
        weights: Largest weights that a rank holds at a time, in bytes: one layer's and those of a
            place in it once more, rounded; or what lies outside of the layers.
        states_per_token: Disk for the hidden states of a token at all borders of layers, and for
            its gradients or those of changed models, in bytes.
        loads: How often each layer is loaded, at most.
    """

    weights: int
    states_per_token: int
    loads: int


def score_memory(
    params: Sequence[Param], problem: Problem, hidden: int, itemsize: int, method: str
) -> ScoreMemory:
    """Return what scoring the places of a model takes.

    Args:
        params: The model's logical parameters.
        problem: The places.
        hidden: Width of its hidden states.
        itemsize: Bytes of a number in the dtype in which it computes.
        method: One of :data:`METHODS`.
    """
    held: dict[int | None, int] = defaultdict(int)
    layer_of = {s.module: p.layer for p in params for s in p.sources}
    for param in params:
        if param.role not in _UNREAD:
            held[param.layer] += prod(param.shape) * itemsize
    rounded: dict[int | None, int] = defaultdict(int)
    for place in (p for p in problem.places if not p.cached):
        layer = layer_of[place.modules[0]]
        rounded[layer] = max(rounded[layer], place.elements * itemsize)
    layers = len([layer for layer in held if layer is not None])
    changes = sum(option.changes for place in problem.places for option in place.options)
    streams, loads = 2, 2  # gradients of what enters a layer, and of what leaves it
    if method == "kl_div":
        streams = 1 + streams_at_once(layers, changes)  # one is written while another is read
        loads = 1 + ceil(changes / (streams - 1))
    return ScoreMemory(
        weights=max(held[layer] + rounded[layer] for layer in held),
        states_per_token=(layers + 1 + streams) * hidden * itemsize,
        loads=loads,
    )
