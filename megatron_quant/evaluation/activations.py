"""Quantize activations in a transformers model, as an engine does with a linear's input.

transformers fuses a layer's experts into 3-D parameters and calls ``linear`` on one expert's view.
So there is no module per expert to replace. ``weight_inputs`` finds every weight where it is used.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel

from megatron_quant.engines.families import checkpoint_name
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import Format, fake_quant
from megatron_quant.models import View, decoder_of, family, unstack
from megatron_quant.weight_inputs import Watched, WeightInputs

_TAG_ROWS = 12
"""Rows of a tag: a conversion may cut a fused parameter into 2, 3 or 4 Hugging Face tensors."""

_LAYER = re.compile(r"(layers\.\d+\.)(.+)")


@dataclass(frozen=True)
class Activations:
    """How a linear's input is stored.

    Attributes:
        fmt: Its format.
        dscale: Scale of the whole tensor (multiply to decode), if the format has one.
    """

    fmt: Format
    dscale: float | None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Round ``x`` to the format, in its own dtype."""
        dscale = None if self.dscale is None else torch.tensor(self.dscale, device=x.device)
        return fake_quant(x, self.fmt, dscale)


def _tag(number: int, parameter: torch.Tensor) -> torch.Tensor:
    """Make a small stand-in for a parameter, every element ``number * 2**16 + expert``."""
    experts = len(parameter) if parameter.ndim == 3 else 1
    tag = number * 2**16 + torch.arange(experts)
    if parameter.ndim == 3:
        return tag[:, None, None].expand(experts, _TAG_ROWS, _TAG_ROWS)
    return tag.expand(_TAG_ROWS) if parameter.ndim == 1 else tag.expand(_TAG_ROWS, _TAG_ROWS)


def saved_tags(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Map each tensor name that ``save_pretrained`` writes to the tag of its parameter.

    Nothing here knows which parameters transformers fuses: the tags go through its own conversion
    to checkpoint names. ``model`` may be on the meta device. Raises CheckpointError if transformers
    is older than 5.0 and has no such conversion.
    """
    return _saved(model, {name: _tag(i, p) for i, (name, p) in enumerate(model.named_parameters())})


def saved_stacks(model: PreTrainedModel) -> tuple[dict[str, tuple[int, ...]], dict[str, View]]:
    """Return the shapes of all tensors that ``save_pretrained`` writes, and views into its stacks.

    The views have the names of single experts. Raises what :func:`saved_tags` raises.
    """
    empty = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in _saved(model, empty).items()}
    return shapes, unstack(model.config.to_dict(), shapes)


def _saved(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not say which weights it fuses: install "
            "transformers 5.0 or newer to evaluate checkpoints"
        ) from None
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return reverted


def _linears(model: PreTrainedModel) -> dict[str, tuple[str, int]]:
    """Map Hugging Face module name to the parameter that holds its weight, and its place there.

    The names are those that ``save_pretrained`` writes, with single experts in place of stacks.
    Members of a fused parameter (gate and up) share one weight.
    """
    parameters = list(model.named_parameters())
    tags, views = saved_tags(model), saved_stacks(model)[1]
    tags |= {name: tags[view.stored][view.expert] for name, view in views.items()}
    found = {}
    for name, tag in tags.items():
        number, expert = divmod(int(tag.flatten()[0]), 2**16)
        parameter, tensor = parameters[number]
        if tensor.ndim in (2, 3):
            found[name.removesuffix(".weight")] = parameter, expert
    return found


def _in_layers(model: PreTrainedModel) -> dict[str, tuple[str, int]]:
    """Map ``layers.N.`` and a linear's name in it, as the hub's files have it, to its place.

    What transformers saves may differ from these files in the prefix and in single names.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    known, found = family(model.config.to_dict()), {}
    at = decoder_of(shapes)
    for name in (n for n, shape in shapes.items() if len(shape) == 2):
        if match := _LAYER.fullmatch(name.removeprefix(at)):
            found[f"{match[1]}{checkpoint_name(known, match[2])}".removesuffix(".weight")] = name, 0
    for module, place in _linears(model).items():
        if place[0].startswith(at) and (match := _LAYER.search(module)):
            found[match[0]] = place
    return found


def linear_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Map Hugging Face module name to the 2-D view that the model multiplies for it."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {
        module: parameters[name] if parameters[name].ndim == 2 else parameters[name][expert]
        for module, (name, expert) in _linears(model).items()
    }


def _merge(module: str, one: Activations | None, two: Activations) -> Activations:
    """Take the larger scale, as engines do: one input feeds all members of a fused weight."""
    if one is None:
        return two
    if one.fmt != two.fmt:
        raise CheckpointError(
            f"{module}: its input is {two.fmt.name}, but {one.fmt.name} for another part of the "
            "same fused weight; quantize both alike"
        )
    return max(one, two, key=lambda a: a.dscale or 0.0)


class QuantizedInputs(WeightInputs):
    """A mode that fake-quantizes the inputs of a model's linears while it is entered.

    The model must multiply each weight where it lies (``experts_implementation="eager"``).
    :meth:`check` proves that it did.

    Args:
        model: The model.
        inputs: Hugging Face module name -> how its input is stored.

    Raises:
        CheckpointError: For a module that is not a linear of the model.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Activations]) -> None:
        self._by_key: dict[str, Activations] = {}
        self._used: set[str] = set()
        self._watched: dict[str, Watched] = {}
        linears, in_layers = _linears(model), _in_layers(model)
        parameters = dict(model.named_parameters())
        for module, activations in inputs.items():
            match = _LAYER.search(module)
            place = linears.get(module) or in_layers.get(match[0] if match else "")
            if place is None:
                raise CheckpointError(
                    f"{module}: transformers' {type(model).__name__} has no such linear, so its "
                    "inputs cannot be quantized; quantize with --eval-text instead"
                )
            name, expert = place
            key = _key(name, expert)
            self._by_key[key] = _merge(module, self._by_key.get(key), activations)
            self._watched[name] = _watched(name, parameters[name].detach())
        super().__init__(self._watched.values(), self._quantize)

    def _quantize(self, key: str, x: torch.Tensor) -> torch.Tensor | None:
        activations = self._by_key.get(key)
        if activations is None:
            return None
        self._used.add(key)
        return activations.apply(x)

    def check(self) -> None:
        """Raise AssertionError if a parameter's input stayed unquantized. Call after a forward.

        An expert may get no token: one expert of a fused parameter is enough.
        """
        missed = {name for name, w in self._watched.items() if not self._used & set(w.keys)}
        assert not missed, f"activations not quantized: {sorted(missed)[:3]}"


def _key(parameter: str, expert: int) -> str:
    return f"{parameter} {expert}"


def _watched(name: str, parameter: torch.Tensor) -> Watched:
    experts = len(parameter) if parameter.ndim == 3 else 1
    return Watched(parameter, tuple(_key(name, expert) for expert in range(experts)))
