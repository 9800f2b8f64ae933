"""Score every option of every place on a batch: by gradients, or by divergence of the logits."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os.path import commonpath
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from megatron_quant.evaluation import nll_and_kl
from megatron_quant.recipes import Rule
from megatron_quant.search.calls import detached, first_output
from megatron_quant.search.loss import Loss, check_loss, check_score, next_token_loss
from megatron_quant.search.weights import Inputs, PlaceWeights


def gradient_scores(
    model: PreTrainedModel,
    places: Sequence[PlaceWeights],
    ids: torch.Tensor,
    loss: Loss = next_token_loss,
) -> torch.Tensor:
    """Score by the gradient of a loss.

    Args:
        model: With a head, in evaluation mode, parameters without gradients.
        places: The places.
        ids: int64 [B, S].
        loss: That of the next token, or another.

    Returns:
        fp64 [options of all places], in order; 0 for options that leave a place as it is.

    Raises:
        CalibrationError: If the loss or a score is not finite.
    """
    scores = [torch.zeros(len(p.place.options), dtype=torch.float64) for p in places]
    watcher = _Watcher()
    handles = [model.get_input_embeddings().register_forward_hook(with_gradient)]
    for weights, found in zip(places, scores, strict=True):
        for name in _scopes(model, weights):
            module = model.get_submodule(name)
            hook = partial(watcher.saw, partial(_add, weights, f"{name}.", found))
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.enable_grad():
            value = loss(model(input_ids=ids, use_cache=False).logits.float(), ids)
            check_loss(value.item())
            value.backward()
    finally:
        for handle in handles:
            handle.remove()
    for weights, found in zip(places, scores, strict=True):
        for i, rule in _quantized(weights):
            check_score("gradient", found[i].item(), weights.place.name, rule.action)
    return torch.cat(scores)


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
    for i, rule in _quantized(weights):
        change = first_output(weights.run(module, prefix, rule, inputs)).float() - before
        found[i] += (gradient.float() * change).square().sum(dtype=torch.float64).cpu()


def divergence_scores(
    model: PreTrainedModel,
    places: Sequence[PlaceWeights],
    ids: torch.Tensor,
    loss: Loss = next_token_loss,
) -> torch.Tensor:
    """Score by the KL divergence of the logits. Arguments and result as :func:`gradient_scores`.

    It takes no loss.

    Raises:
        CalibrationError: If a divergence is not finite.
    """
    inputs = Inputs((), {"input_ids": ids, "use_cache": False})
    labels = ids.flatten()
    with torch.no_grad():
        before = model(**inputs.kwargs).logits.flatten(0, 1)
    scores = []
    for weights in places:
        found = torch.zeros(len(weights.place.options), dtype=torch.float64)
        for i, rule in _quantized(weights):
            after = weights.run(model, "", rule, inputs).logits.flatten(0, 1)
            found[i] = max(nll_and_kl(after, before, labels).kl, 0.0)
            check_score("kl_div", found[i].item(), weights.place.name, rule.action)
        scores.append(found)
    return torch.cat(scores)


SCORERS = {"gradient": gradient_scores, "kl_div": divergence_scores}
"""Method -> its function."""


def _quantized(weights: PlaceWeights) -> Iterator[tuple[int, Rule]]:
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


def with_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Begin a graph at a module's output: a forward hook."""
    return output.detach().requires_grad_()
