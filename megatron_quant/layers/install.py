"""Turning a model's layers into their quantized subclasses, as a plan says: all or nothing."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from enum import Enum
from io import StringIO

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import QuantModuleRegistry
from torch import nn

from megatron_quant.errors import CoverageError, LayoutError
from megatron_quant.layers import te  # noqa: F401  (registers the grouped classes)
from megatron_quant.layers.backend import quantizer_attributes
from megatron_quant.layers.grouped import QuantGroupedLinear
from megatron_quant.recipes.plan import Decision, QuantPlan

_ALL_OFF = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None}


class ExpertScales(Enum):
    """Whose weight amax an expert's tensor scale comes from."""

    SHARED = "shared"  # the largest of all experts of the layer, on every rank
    PER_EXPERT = "per_expert"


@dataclass(frozen=True)
class LocalWeight:
    """Where this rank keeps (its shard of) a slot: ``model.get_submodule(module).attribute``."""

    slot: str
    module: str
    attribute: str


@dataclass(frozen=True)
class QuantLayer:
    """One converted linear of this rank, with the decisions on its weights in local order."""

    module: nn.Module
    decisions: tuple[Decision, ...]
    attributes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Global Megatron module name."""
        return self.decisions[0].slot.module

    def weights(self) -> list[torch.Tensor]:
        """The rank's shards [N, K], one a decision."""
        return [getattr(self.module, attribute) for attribute in self.attributes]

    def weight_amax(self, index: int) -> torch.Tensor:
        """The calibrated amax of the ``index``-th weight's logical tensor, fp32 []."""
        amax = self.module.weight_quantizer.amax.float()
        return amax[index].reshape(()) if amax.numel() > 1 else amax.reshape(())

    def input_amax(self) -> torch.Tensor | None:
        """The calibrated amax of the inputs, fp32 []; None for weight-only layers."""
        quantizer = self.module.input_quantizer
        return quantizer.amax.float().reshape(()) if quantizer.is_enabled else None


def attach(
    model: nn.Module,
    plan: QuantPlan,
    weights: Sequence[LocalWeight],
    expert_scales: ExpertScales = ExpertScales.SHARED,
) -> list[QuantLayer]:
    """Convert ``model`` in place; return its quantized layers in the model's order.

    ``weights``: this rank's share of the plan's slots. Everything is checked before the first
    layer changes. Raises CoverageError for a layer that cannot carry what the plan asks of it,
    LayoutError where a shard ends inside a quantization group.
    """
    chosen = _by_module(plan, weights)
    for name, members in chosen.items():
        _check(name, model.get_submodule(name), members)
    with redirect_stdout(StringIO()):  # ModelOpt prints how many quantizers, on every rank
        mtq.quantize(model, _ALL_OFF)
    return [_configure(model.get_submodule(n), m, expert_scales) for n, m in chosen.items()]


_Members = list[tuple[Decision, str]]


def _by_module(plan: QuantPlan, weights: Sequence[LocalWeight]) -> dict[str, _Members]:
    chosen: dict[str, _Members] = {}
    for weight in weights:
        decision = plan.by_name[weight.slot]
        if decision.quantized:
            chosen.setdefault(weight.module, []).append((decision, weight.attribute))
    return chosen


def _check(name: str, module: nn.Module, members: _Members) -> None:
    if type(module) not in QuantModuleRegistry:
        raise CoverageError(
            f"{name} is a {type(module).__name__}, which has no quantized class: "
            "build the model with the Transformer Engine layer spec, or exclude the weight"
        )
    for decision, attribute in members:
        _check_shard(decision, getattr(module, attribute))


def _check_shard(decision: Decision, weight: torch.Tensor) -> None:
    fmt = decision.weights
    assert fmt is not None
    if fmt.group_size and weight.shape[-1] % fmt.group_size:
        raise LayoutError(
            f"{decision.slot.name}: a rank's {weight.shape[-1]} of {decision.slot.shape[-1]} input "
            f"features do not end at a {fmt.name} group of {fmt.group_size}: choose a smaller "
            "group_size or a smaller tensor-parallel size"
        )


def _configure(module: nn.Module, members: _Members, scales: ExpertScales) -> QuantLayer:
    decisions, attributes = zip(*members, strict=True)
    grouped = isinstance(module, QuantGroupedLinear)
    if grouped:
        expected = tuple(f"weight{i}" for i in range(module.num_gemms))
        assert attributes == expected, f"{decisions[0].slot.module} has {attributes}"
    decision, per_expert = decisions[0], grouped and scales is ExpertScales.PER_EXPERT
    assert decision.weights is not None
    module.weight_quantizer.set_from_attribute_config(
        quantizer_attributes(decision.weights, axis=0 if per_expert else None)
    )
    if decision.inputs is not None:
        module.input_quantizer.set_from_attribute_config(quantizer_attributes(decision.inputs))
    return QuantLayer(module, decisions, attributes)
