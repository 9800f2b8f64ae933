"""Follow the ranges of a model in training, merge them over ranks, and measure their drift.

Weights take the largest magnitude that they have. Inputs take the values that training itself feeds
them: their running maximum, or an exponential average.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_quant.calib.observe import InputAmax
from megatron_quant.calib.sync import merge_max
from megatron_quant.dist import Groups, gather
from megatron_quant.errors import CalibrationError
from megatron_quant.formats import amax
from megatron_quant.layers import AMAX, BLOCK_AMAX, QuantLayer, set_block_amax
from megatron_quant.recipes import QuantPlan


class TrainingAmax(InputAmax):
    """A running amax over forwards in training mode alone, each of them once."""

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Update the amax; a forward pre-hook of the input quantizer."""
        # Within a backward, recomputed activations call it, and so do ModelOpt's layers, which
        # quantize their inputs again for the weight's gradient.
        within_backward = torch._C._current_graph_task_id() != -1
        if module.training and not within_backward:
            super().__call__(module, (args[0].detach(),))


class RunningInputs:
    """A watch on the layers whose inputs have a static scale, until :meth:`close`."""

    def __init__(self, layers: Sequence[QuantLayer]) -> None:
        self._seen = {layer.name: TrainingAmax() for layer in layers if layer.static_inputs}
        self._hooks = [
            layer.input_quantizer.register_forward_pre_hook(self._seen[layer.name])
            for layer in layers
            if layer.static_inputs
        ]

    def take(self) -> dict[str, torch.Tensor]:
        """Return module name -> largest input since the last call, of those that saw a token."""
        found = {name: seen.value for name, seen in self._seen.items() if seen.value is not None}
        for seen in self._seen.values():
            seen.value = None
        return found

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


Ranges = tuple[Mapping[str, torch.Tensor], ...]
"""Contents of each quantizer of some layers by the buffer's name, in their order."""


def ranges_of(layers: Sequence[QuantLayer]) -> Ranges:
    """Copy the buffers of the quantizers of ``layers`` in fp32."""
    return tuple(
        {name: held.detach().float().clone() for name, held in q.named_buffers(recurse=False)}
        for layer in layers
        for q in layer.quantizers
    )


def set_ranges(layers: Sequence[QuantLayer], ranges: Ranges) -> None:
    """Put the buffers that :func:`ranges_of` copied back into the quantizers, in fp32."""
    quantizers = (q for layer in layers for q in layer.quantizers)
    for quantizer, held in zip(quantizers, ranges, strict=True):
        here = {n: values.to(quantizer.get_buffer(n).device) for n, values in held.items()}
        if AMAX in here:
            quantizer.reset_amax()  # or the new one is rounded to its dtype
            quantizer.amax = here[AMAX].clone()
        if BLOCK_AMAX in here:
            set_block_amax(quantizer, here[BLOCK_AMAX].clone())


@dataclass(frozen=True)
class Live:
    """Amaxes over all ranks: of weights by slot name, of inputs by module name."""

    weights: Mapping[str, float]
    inputs: Mapping[str, float]


def merge_live(
    layers: Sequence[QuantLayer],
    plan: QuantPlan,
    groups: Groups,
    inputs: Mapping[str, torch.Tensor],
) -> Live:
    """Merge the amaxes of weights and inputs in one collective; equal on every rank.

    Args:
        layers: This rank's layers.
        plan: Decisions on every slot of the model.
        groups: This rank's groups.
        inputs: This rank's largest inputs by module name, from :meth:`RunningInputs.take`.

    Raises:
        CalibrationError: On every rank alike, for an amax that is not finite.
    """
    slots = [d.slot.name for d in plan.quantized]
    static = (d.slot.module for d in plan.quantized if d.inputs and d.inputs.tensor_scale)
    modules = list(dict.fromkeys(static))
    weights = {
        d.slot.name: amax(weight.detach())
        for layer in layers
        for d, weight in zip(layer.decisions, layer.weights(), strict=True)
    }
    fed = {f"inputs of {name}": value.to("cpu") for name, value in inputs.items()}
    own = {name: value.to("cpu") for name, value in weights.items()} | fed
    merged = merge_max([*slots, *(f"inputs of {name}" for name in modules)], own, groups)
    for name, value in merged.items():
        if value == float("inf"):
            raise CalibrationError(
                f"{name} is NaN or Inf in training: lower the learning rate, or leave the layer "
                "unquantized"
            )
    return Live(
        {name: merged[name] for name in slots},
        {name: merged[key] for name in modules if (key := f"inputs of {name}") in merged},
    )


def update_inputs(
    layers: Sequence[QuantLayer], live: Mapping[str, float], average: float | None
) -> None:
    """Give the layers' inputs their new range; a module that is not in ``live`` keeps its own.

    Args:
        layers: This rank's layers.
        live: Merged amaxes of inputs by module name.
        average: Weight of the newest amax in an exponential average; None for a running maximum.
    """
    for layer in layers:
        if not layer.static_inputs or layer.name not in live:
            continue
        quantizer, newest = layer.input_quantizer, live[layer.name]
        if quantizer.amax is not None:
            stored = float(quantizer.amax)
            newest = (
                max(stored, newest) if average is None else stored + average * (newest - stored)
            )
        quantizer.amax = torch.tensor(newest, device=layer.weights()[0].device)


@dataclass(frozen=True, order=True)
class Drift:
    """The ratio of a live amax to the stored one, and the tensor's name."""

    ratio: float
    name: str


def largest_drift(layers: Sequence[QuantLayer], live: Live, groups: Groups) -> Drift | None:
    """Return the largest drift of all ranks; None where no range is stored. Collective."""
    own = max(_drifts(layers, live), default=None)
    return max((d for d in gather(own, groups) if d is not None), default=None)


def _drifts(layers: Sequence[QuantLayer], live: Live) -> Iterator[Drift]:
    for layer in layers:
        for index, decision in enumerate(layer.decisions):
            stored = layer.weight_amax(index) if layer.weight_format.tensor_scale else None
            if stored is not None:
                name = decision.slot.name
                yield _drift(live.weights[name], stored, name)
        if layer.name in live.inputs and layer.input_quantizer.amax is not None:
            stored = layer.input_quantizer.amax
            yield _drift(live.inputs[layer.name], stored, f"inputs of {layer.name}")


def _drift(live: float, stored: torch.Tensor, name: str) -> Drift:
    largest = float(stored)
    return Drift(live / largest if largest else float(live > 0), name)
