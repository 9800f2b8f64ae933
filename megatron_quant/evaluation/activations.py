"""Quantize activations in a transformers model, as an engine does with a linear's input.

transformers fuses a layer's experts into 3-D parameters and calls ``linear`` on one expert's view.
So there is no module per expert to replace. Every weight is recognized where it is used, by its
address, inside ``torch.nn.functional.linear``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from megatron_quant.errors import CheckpointError
from megatron_quant.formats import Format, fake_quant

_TAG_ROWS = 12
"""Rows of a tag: a conversion may cut a fused parameter into 2, 3 or 4 Hugging Face tensors."""


@dataclass(frozen=True)
class Activations:
    """The storage of a linear's input.

    Attributes:
        fmt: Its format.
        dscale: Scale of the whole tensor (multiply to decode), where the format has one.
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

    Nothing here knows which parameters transformers fuses: tags go through its own conversion to
    checkpoint names. ``model`` may be on the meta device. Raises CheckpointError where transformers
    is older than 5.0, which has no such conversion.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not say what it fuses: install "
            "transformers 5.0 or newer to evaluate checkpoints"
        ) from None
    tags = {name: _tag(i, p) for i, (name, p) in enumerate(model.named_parameters())}
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, tags)
    return reverted


def linear_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Map Hugging Face module name to the 2-D view that ``linear`` multiplies for it.

    The names are those that ``save_pretrained`` writes. Members of a fused parameter (gate and up)
    share one view.
    """
    views = []
    for parameter in model.parameters():
        views.append(parameter.detach().unbind(0) if parameter.ndim == 3 else [parameter.detach()])
    found = {}
    for name, tag in saved_tags(model).items():
        number, expert = divmod(int(tag.flatten()[0]), 2**16)
        if views[number][expert].ndim == 2:
            found[name.removesuffix(".weight")] = views[number][expert]
    return found


def _merge(module: str, one: Activations | None, two: Activations) -> Activations:
    """Take the larger scale: one input feeds all members of a fused weight, and engines do so."""
    if one is None:
        return two
    if one.fmt != two.fmt:
        raise CheckpointError(
            f"{module}: its input is {two.fmt.name}, {one.fmt.name} for another part of the same "
            "fused weight; quantize both alike"
        )
    return max(one, two, key=lambda a: a.dscale or 0.0)


class QuantizedInputs(TorchFunctionMode):
    """A mode that fake-quantizes the inputs of a model's linears while it is entered.

    The model must call ``linear`` on each weight (``experts_implementation="eager"``).
    :meth:`check` proves that it did.

    Args:
        model: The model.
        inputs: Hugging Face module name -> how its input is stored.

    Raises:
        CheckpointError: For a module that is no linear of the model.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Activations]) -> None:
        super().__init__()
        self._by_address: dict[int, Activations] = {}
        self._parameters: dict[int, str] = {}
        self._used: set[str] = set()
        weights = linear_weights(model)
        for module, activations in inputs.items():
            if module not in weights:
                raise CheckpointError(
                    f"{module}: transformers' {type(model).__name__} has no such linear, whose "
                    "inputs could be quantized; quantize with --eval-text instead"
                )
            address = weights[module].data_ptr()
            merged = _merge(module, self._by_address.get(address), activations)
            self._by_address[address] = merged
        self._name_parameters(model.named_parameters())

    def _name_parameters(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, parameter in parameters:
            views = parameter.unbind(0) if parameter.ndim == 3 else [parameter]
            for view in views:
                if view.data_ptr() in self._by_address:
                    self._parameters[view.data_ptr()] = name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.linear:
            return func(*args, **kwargs)
        x_TK, weight_NK, *rest = args
        address = weight_NK.data_ptr()
        activations = self._by_address.get(address)
        if activations is None:
            return func(*args, **kwargs)
        self._used.add(self._parameters[address])
        return func(activations.apply(x_TK), weight_NK, *rest, **kwargs)

    def check(self) -> None:
        """Raise AssertionError where a parameter's input went by unquantized. Call after a forward.

        An expert may have no token: one expert of a fused parameter is enough.
        """
        missed = set(self._parameters.values()) - self._used
        assert not missed, f"activations not quantized: {sorted(missed)[:3]}"
