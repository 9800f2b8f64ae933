"""Round whole families of a model's places, module by module, while it runs."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from megatron_quant.recipes import Rule
from megatron_quant.search.problem import Option, Place
from megatron_quant.search.weights import PlaceWeights
from megatron_quant.weight_inputs import Watched, WeightInputs

_LAYER = re.compile(r".*?\blayers\.(\d+)\.")
_KINDS = (
    ("linear attention", re.compile(r"linear_attn|\bmamba|\bmixer\b|\bkda\b|\bconv\b")),
    ("attention", re.compile(r"attn|attention")),
    ("shared experts", re.compile(r"shared_expert|shared_mlp")),
    ("experts", re.compile(r"\.experts\b")),
)
EVERYTHING, MLP, OUTPUT = "everything", "mlp", "lm_head"
FIRST, LAST = "first layer", "last layer"


def family_of(place: Place) -> str:
    """Return the family of a place: its kind of layer, alike in all models."""
    if place.output:
        return OUTPUT
    return next((name for name, kind in _KINDS if kind.search(place.name)), MLP)


def families(places: Sequence[Place]) -> dict[str, tuple[int, ...]]:
    """Return the places of each family, by their numbers; families without places are left out.

    The first and the last layer, and everything, are families beside the kinds.
    """
    found: dict[str, list[int]] = {}
    for i, place in enumerate(places):
        found.setdefault(family_of(place), []).append(i)
    layers = {i: int(m[1]) for i, p in enumerate(places) if (m := _LAYER.match(p.name))}
    if layers:
        ends = ((FIRST, min(layers.values())), (LAST, max(layers.values())))
        found |= {name: [i for i, n in layers.items() if n == end] for name, end in ends}
    found[EVERYTHING] = list(range(len(places)))
    return {name: tuple(members) for name, members in found.items()}


def option_of(place: Place, candidate: str) -> Option | None:
    """Return what a candidate does at a place; None if it leaves it as it is."""
    for option in place.options:
        if candidate in option.candidates and option.rule.weights is not None:
            return option
    return None


@contextmanager
def ablated(chosen: Sequence[tuple[PlaceWeights, Rule]]) -> Iterator[None]:
    """Run a model, while the context lasts, with places and their inputs rounded.

    The weights are rounded now, and put back at the end: both are in memory. Call it without
    gradients.

    Args:
        chosen: The places, and how each is rounded.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    rounding: dict[str, Any] = {}
    watched: list[Watched] = []
    for weights, rule in (pair for pair in chosen if pair[1].inputs is not None):
        for h in weights.held:
            names = tuple(s.name for s in h.slots)
            rounding |= dict.fromkeys(names, weights.round_inputs(rule))
            watched.append(Watched(h.parameter, names))
    try:
        for h, rounded in ((h, w.rounded(h, rule)) for w, rule in chosen for h in w.held):
            kept.append((h.parameter, h.parameter.clone()))
            h.parameter.copy_(rounded)
        with WeightInputs(watched, partial(_rounded_input, rounding)):
            yield
    finally:
        for parameter, values in kept:
            parameter.copy_(values)


def _rounded_input(rounding: dict[str, Any], name: str, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = rounding[name](name, x)
    return found
