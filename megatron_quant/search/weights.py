"""Run a part of transformers' model with one place rounded as an option says."""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from megatron_quant.formats import FOUR_OVER_SIX_RANGE, amax, fake_quant, tensor_scale
from megatron_quant.models import Param
from megatron_quant.recipes import Decision, Rule, Slot
from megatron_quant.search.problem import Place, Problem
from megatron_quant.streaming import Sharing, keys_of, searched_stat, watched
from megatron_quant.weight_inputs import Watched, WeightInputs


@dataclass(frozen=True)
class Held:
    """A parameter of transformers' model that holds weights of a place.

    Attributes:
        name: Its name in the model.
        parameter: [N, K], or [E, N, K] for a stack of experts; the last two dims may be swapped.
        slots: The weight of each expert, or the only one.
        swapped: Whether it is stored as [K, N].
    """

    name: str
    parameter: torch.Tensor
    slots: tuple[Slot, ...]
    swapped: bool

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the weight of each slot, [N, K], in a tensor like the parameter."""
        each = list(tensor) if tensor.dim() == 3 else [tensor]
        return [w.mT if self.swapped else w for w in each]


@dataclass(frozen=True, kw_only=True)
class PlaceWeights:
    """A place's weights in transformers' model.

    Attributes:
        place: The place.
        held: Parameters that hold them.
        sharing: Slot -> name of its scale.
        input_amax: Amax of inputs by slot, fp32 [], of those that have a static scale.
    """

    place: Place
    held: tuple[Held, ...]
    sharing: Sharing
    input_amax: Mapping[str, torch.Tensor]

    @cached_property
    def _amaxes(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for held in self.held:
            for slot, w in zip(held.slots, held.views(held.parameter), strict=True):
                key, own = self.sharing(slot), amax(w)
                found[key] = torch.maximum(found.get(key, own), own)
        return found

    def run(self, module: nn.Module, prefix: str, rule: Rule, inputs: "Inputs") -> Any:
        """Call ``module`` with the place's weights and their inputs rounded as ``rule`` says.

        Args:
            module: A module of the model that holds all of the place's weights, or some.
            prefix: Its name in the model, with a dot; empty for the model itself.
            rule: The option.
            inputs: Arguments of the call.
        """
        own = [h for h in self.held if h.name.startswith(prefix)]
        new = {h.name: self.rounded(h, rule) for h in own}
        local = {name.removeprefix(prefix): tensor for name, tensor in new.items()}
        mode: Any = nullcontext()
        if rule.inputs is not None:
            seen = [Watched(new[h.name], tuple(s.name for s in h.slots)) for h in own]
            mode = WeightInputs(seen, self.round_inputs(rule))
        with torch.no_grad(), mode:
            return functional_call(module, local, inputs.args, dict(inputs.kwargs))

    def rounded(self, held: Held, rule: Rule) -> torch.Tensor:
        """Return a parameter with its weights rounded as ``rule`` says."""
        new = held.parameter.clone()
        for slot, w_NK, out_NK in zip(
            held.slots, held.views(held.parameter), held.views(new), strict=True
        ):
            out_NK.copy_(self._weight(w_NK.contiguous(), slot, rule))
        return new

    def _weight(self, w_NK: torch.Tensor, slot: Slot, rule: Rule) -> torch.Tensor:
        fmt = rule.weights
        assert fmt is not None
        decision = Decision(slot=slot, rule="", weights=fmt, algorithm=rule.algorithm)
        largest = self._amaxes[self.sharing(slot)]
        if rule.algorithm == "four_over_six":
            largest = largest * FOUR_OVER_SIX_RANGE
        stat = searched_stat(w_NK, decision, largest, (0, 0))
        return fake_quant(w_NK, fmt, tensor_scale(largest, fmt) if fmt.tensor_scale else None, stat)

    def round_inputs(self, rule: Rule) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """Return a function that rounds the inputs of a slot, given its name and the inputs."""
        fmt = rule.inputs
        assert fmt is not None

        def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
            scale = tensor_scale(self.input_amax[name], fmt) if fmt.tensor_scale else None
            return fake_quant(x, fmt, scale)

        return rounded


@dataclass(frozen=True)
class Inputs:
    """Arguments of a module's forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """All that it takes to find the weights of places in transformers' model.

    Attributes:
        model: The model.
        problem: The places.
        params: The model's logical parameters.
        slots: Their slots, by name.
        sharing: Slot -> name of its scale.
        input_amax: Amax of inputs by slot, of those that have a static scale.
    """

    model: PreTrainedModel
    problem: Problem
    params: Sequence[Param]
    slots: Mapping[str, Slot]
    sharing: Sharing
    input_amax: Mapping[str, torch.Tensor]

    def layer_of(self, place: Place) -> int | None:
        """Return the decoder layer of a place of weights; None for the output layer."""
        return self._layers[place.modules[0]]

    @cached_property
    def _layers(self) -> dict[str, int | None]:
        return {
            s.module: None if p.layer is None else int(p.layer)
            for p in self.params
            for s in p.sources
        }

    def check(self) -> None:
        """Raise CheckpointError for a place with a weight that no parameter holds."""
        modules = {m for place in self.problem.places for m in place.modules}
        watched(self.model, self._wanted(modules))

    def _wanted(self, modules: Container[str]) -> list[Param]:
        return [p for p in self.params if p.sources[0].module in modules and len(p.shape) == 2]

    def at(self, layer: int | None) -> list[PlaceWeights]:
        """Find the weights of a layer's places; of the output layer with None.

        They must be loaded, and stay so for as long as the result is used.
        """
        places = [p for p in self.problem.places if not p.cached and self.layer_of(p) == layer]
        of_module = {m: place.name for place in places for m in place.modules}
        wanted = self._wanted(of_module)
        by_key = {key: p for p in wanted for key in keys_of(p)}
        names = {p.data_ptr(): name for name, p in self.model.named_parameters()}
        found: dict[str, list[Held]] = {place.name: [] for place in places}
        for w in watched(self.model, wanted):
            members = [by_key[key] for key in w.keys]
            held = _held(
                self.model, names[w.parameter.data_ptr()], w.parameter, members, self.slots
            )
            found[of_module[members[0].sources[0].module]].append(held)
        for param in (p for p in wanted if not keys_of(p)):  # the output layer
            head = self.model.get_output_embeddings().weight.data
            held = Held(names[head.data_ptr()], head, (self.slots[param.name],), False)
            found[of_module[param.sources[0].module]].append(held)
        sharing, amaxes = self.sharing, self.input_amax
        return [
            PlaceWeights(place=p, held=tuple(found[p.name]), sharing=sharing, input_amax=amaxes)
            for p in places
        ]


def _held(
    model: PreTrainedModel,
    name: str,
    parameter: torch.Tensor,
    members: Sequence[Param],
    slots: Mapping[str, Slot],
) -> Held:
    owner = model.get_submodule(name.rpartition(".")[0])
    swapped = bool(getattr(owner, "is_transposed", False)) and parameter.dim() == 3
    if parameter.shape[-1] != members[0].sources[0].shape[1]:
        swapped = True
    return Held(name, parameter, tuple(slots[p.name] for p in members), swapped)
