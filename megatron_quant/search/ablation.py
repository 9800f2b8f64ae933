"""Round whole families of a model's places, module by module, while it runs."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from megatron_quant.recipes import Rule
from megatron_quant.search.problem import Option, Place
from megatron_quant.search.weights import Held, PlaceWeights
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


@dataclass(frozen=True)
class _Module:
    """A module's parameters that are rounded while it runs, and those that wait meanwhile."""

    weights: PlaceWeights
    rule: Rule
    held: tuple[Held, ...]
    kept: list[torch.Tensor]

    def before(self, module: nn.Module, args: Any) -> None:
        """Round the parameters; a forward pre-hook."""
        for held in self.held:
            rounded = self.weights.rounded(held, self.rule)
            self.kept.append(held.parameter.clone())
            held.parameter.copy_(rounded)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the parameters back; a forward hook, called after an error too."""
        for held, parameter in zip(self.held, self.kept, strict=False):
            held.parameter.copy_(parameter)
        self.kept.clear()


@contextmanager
def ablated(model: PreTrainedModel, chosen: Sequence[tuple[PlaceWeights, Rule]]) -> Iterator[None]:
    """Run the model, while the context lasts, with places and their inputs rounded.

    A module's weights are rounded when it is called and put back when it returns: memory does not
    grow with the number of places. Call it without gradients.

    Args:
        model: The model.
        chosen: The places, and how each is rounded.
    """
    hooks: list[Any] = []
    watched: list[Watched] = []
    rounding: dict[str, Any] = {}
    for weights, rule in chosen:
        weights.measure()
        by_module: dict[str, list[Held]] = {}
        for held in weights.held:
            by_module.setdefault(held.name.rpartition(".")[0], []).append(held)
        for name, own in by_module.items():
            module, rounded = model.get_submodule(name), _Module(weights, rule, tuple(own), [])
            hooks.append(module.register_forward_pre_hook(rounded.before))
            hooks.append(module.register_forward_hook(rounded.after, always_call=True))
        if rule.inputs is not None:
            names = [s.name for h in weights.held for s in h.slots]
            rounding |= dict.fromkeys(names, weights.round_inputs(rule))
            watched += [
                Watched(h.parameter.data, tuple(s.name for s in h.slots)) for h in weights.held
            ]
    try:
        with WeightInputs(watched, partial(_rounded_input, rounding)):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded_input(rounding: dict[str, Any], name: str, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = rounding[name](name, x)
    return found
