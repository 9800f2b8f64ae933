"""Score places by the gradients of their outputs, in any backward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from os.path import commonpath
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from megatron_quant.recipes import Rule
from megatron_quant.search.calls import detached, first_output
from megatron_quant.search.weights import Inputs, PlaceWeights


@contextmanager
def scored(
    model: PreTrainedModel, places: Sequence[tuple[PlaceWeights, torch.Tensor]]
) -> Iterator[None]:
    """Score places by every forward and its backward while the context lasts.

    The score of an option is the sum of (gradient of the place's output x change of it)^2. Inputs
    are kept until the gradient comes, and then run through the place in each option.

    Args:
        model: The model, in evaluation mode, parameters without gradients.
        places: The places, and the scores of their options, fp64 [options], which grow.
    """
    watcher, handles = _Watcher(), []
    for weights, found in places:
        for name in _scopes(model, weights):
            module = model.get_submodule(name)
            hook = partial(watcher.saw, partial(_add, weights, f"{name}.", found))
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """Waits for the gradient of a module's output, and then scores the module.

    Attributes:
        busy: Whether a module is run again to be scored, which is not to be watched.
    """

    def __init__(self) -> None:
        self.busy = False

    def saw(
        self,
        score: Callable[[nn.Module, Inputs, torch.Tensor], None],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        """Note the arguments of a forward; be called by a hook."""
        out = first_output(output)
        if self.busy or not out.requires_grad:
            return
        kept = Inputs(detached(args), {k: detached(v) for k, v in kwargs.items()})

        def scored(gradient: torch.Tensor) -> None:
            self.busy = True
            try:
                score(module, kept, gradient)
            finally:
                self.busy = False

        out.register_hook(scored)


def _add(
    weights: PlaceWeights,
    prefix: str,
    found: torch.Tensor,
    module: nn.Module,
    inputs: Inputs,
    gradient: torch.Tensor,
) -> None:
    """Add a module's part to the scores of its place."""
    with torch.no_grad():
        before = first_output(module(*inputs.args, **inputs.kwargs)).float()
    for i, rule in quantized(weights):
        change = first_output(weights.run(module, prefix, rule, inputs)).float() - before
        found[i] += (gradient.float() * change).square().sum(dtype=torch.float64).cpu()


def quantized(weights: PlaceWeights) -> Iterator[tuple[int, Rule]]:
    """Yield the options of a place that round its weights: number and rule."""
    rules = (option.rule for option in weights.place.options)
    return ((i, rule) for i, rule in enumerate(rules) if rule.weights is not None)


def _scopes(model: PreTrainedModel, weights: PlaceWeights) -> list[str]:
    """Name the modules at whose outputs a place is scored.

    They are its linears; for a layer's experts, and for shared ones, the block of all of them.
    """
    owners = sorted({held.name.rpartition(".")[0] for held in weights.held})
    if not all(m.startswith(f"{weights.place.name}.") for m in weights.place.modules):
        return owners
    parts = commonpath(owner.replace(".", "/") for owner in owners).split("/")
    while isinstance(model.get_submodule(".".join(parts)), nn.ModuleList | nn.ModuleDict):
        parts = parts[:-1]
    return [".".join(parts)]
