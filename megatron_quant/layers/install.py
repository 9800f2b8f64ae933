"""Turn a model's layers into their quantized subclasses, as a plan says: all or none."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from enum import Enum
from io import StringIO

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from torch import nn

from megatron_quant.errors import CoverageError, LayoutError
from megatron_quant.formats import Format, Region, grids, whole_matrix
from megatron_quant.layers.backend import (
    KeptGrid,
    block_amax,
    grid_of,
    quantizer_attributes,
    regions_of,
    reset_block_amax,
    set_grid,
    set_regions,
    split_stat,
)
from megatron_quant.layers.dense_rows import DenseRows
from megatron_quant.layers.grouped import QuantGroupedLinear
from megatron_quant.layers.registry import register
from megatron_quant.layers.te import (
    fusion_kept,
    mode_state_kept,
    refuse_capture,
    refuse_cuda_graphs,
    refuse_fp8,
)
from megatron_quant.native import WHOLE
from megatron_quant.recipes import Decision, QuantPlan

_ALL_OFF = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None}


class ExpertScales(Enum):
    """Which weight amax an expert's tensor scale comes from."""

    SHARED = "shared"  # the largest of all experts of the layer, on every rank
    PER_EXPERT = "per_expert"


@dataclass(frozen=True, kw_only=True)
class LocalWeight:
    """Where this rank keeps its shard of a slot: ``model.get_submodule(module).attribute``.

    regions: the parts of the slot's logical tensors that it holds, in the order of its rows; empty
        if the weight is one whole logical tensor. rows: how many of the weight's rows, its first
        ones, are the slot's; None for all.
    """

    slot: str
    module: str
    attribute: str
    regions: tuple[Region, ...] = ()
    rows: int | None = None


@dataclass(frozen=True)
class QuantLayer:
    """One converted linear of this rank, with the decisions on its weights in local order.

    rows: how many rows of a weight, its first ones, are quantized; None for all.
    """

    module: nn.Module
    decisions: tuple[Decision, ...]
    attributes: tuple[str, ...]
    rows: int | None = None

    @property
    def name(self) -> str:
        """Return the global Megatron module name."""
        return self.decisions[0].slot.module

    @property
    def sharing(self) -> str:
        """Return :attr:`Slot.sharing` of its weights."""
        return self.decisions[0].slot.sharing

    @property
    def weight_format(self) -> Format:
        """Return the format of the weights."""
        fmt = self.decisions[0].weights
        assert fmt is not None
        return fmt

    @property
    def searches_blocks(self) -> bool:
        """Return whether its weights' block scales are searched."""
        return self.decisions[0].searches_blocks

    @property
    def keeps_blocks(self) -> bool:
        """Return whether blocks keep the statistics that calibration found, whatever the weight."""
        return self.decisions[0].keeps_blocks

    @property
    def weighted(self) -> bool:
        """Return whether the search for scales weighs columns by the squares of their inputs."""
        return self.decisions[0].weighted

    @property
    def needs_channels(self) -> bool:
        """Return whether calibration data must show each channel of the inputs."""
        return self.decisions[0].needs_channels

    @property
    def rounds(self) -> bool:
        """Return whether codes are chosen by the second moments of the inputs (gptq)."""
        return self.decisions[0].rounds

    @property
    def serves_codes(self) -> bool:
        """Return whether they are rounded for inputs in 4 bits, not for the inputs themselves."""
        return self.decisions[0].serves_codes

    @property
    def measured(self) -> bool:
        """Return whether calibration data must show the inputs."""
        return self.decisions[0].measured

    @property
    def static_inputs(self) -> bool:
        """Return whether the inputs' scale is calibrated, not taken from each call's inputs."""
        return self.decisions[0].static

    @property
    def grouped(self) -> bool:
        """Return whether the weights belong to experts."""
        return isinstance(self.module, QuantGroupedLinear)

    @property
    def regions(self) -> tuple[Region, ...]:
        """Return each weight's parts of logical tensors; each part has its own block grid."""
        return regions_of(self.weight_quantizer)

    @property
    def per_expert(self) -> bool:
        """Return whether its weights are experts' and each has its own amax."""
        return isinstance(self.module, QuantGroupedLinear) and self.module.per_expert

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """Return the quantizer of its weights."""
        return _quantizer(self.module.weight_quantizer)

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """Return the quantizer of its inputs."""
        return _quantizer(self.module.input_quantizer)

    @property
    def quantizers(self) -> tuple[TensorQuantizer, ...]:
        """Return the quantizers that a forward calls."""
        return (self.weight_quantizer, self.input_quantizer)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that have the weights, one per decision, and maybe more rows."""
        return [getattr(self.module, attribute) for attribute in self.attributes]

    def weights(self) -> list[torch.Tensor]:
        """Return the rank's shards [N, K], one per decision."""
        if self.rows is None:
            return [*self.parameters]
        return [parameter[: self.rows] for parameter in self.parameters]

    def weight_amax(self, index: int) -> torch.Tensor | None:
        """Return the calibrated amax of the ``index``-th weight's logical tensor, fp32 [].

        None for microscaling formats, whose quantizers have none (ModelOpt).
        """
        amax: torch.Tensor | None = self.weight_quantizer.amax
        if amax is None:
            return None
        return amax.float()[index if amax.numel() > 1 else ...].reshape(())

    def amax_of_stack(self) -> torch.Tensor:
        """Return the weights' calibrated amaxes for the codecs: fp32 [] or [E, 1, 1]."""
        amax: torch.Tensor = self.weight_quantizer.amax
        return amax.float()

    def input_amax(self) -> torch.Tensor | None:
        """Return the inputs' calibrated amax, fp32 []; None if they have no static scale."""
        return self.input_quantizer.amax.float().reshape(()) if self.static_inputs else None

    def block_stat(self, index: int, region: Region) -> torch.Tensor | None:
        """Return the statistics of the blocks that a region of the ``index``-th weight touches.

        fp32 [N_b, K_b, P]; None if they follow from the region alone.
        """
        stat = block_amax(self.weight_quantizer)
        if stat is None:
            return None
        own = stat[index] if self.grouped else stat
        if region in self.regions:
            found = split_stat(own, self.regions, self.weight_format)
            return found[self.regions.index(region)]
        return torch.cat([own[start:stop] for start, stop in region.rows])  # a block has one row

    def keep(self, grid: KeptGrid) -> None:
        """Round the weights onto ``grid`` from now on."""
        set_grid(self.weight_quantizer, grid)

    @property
    def keeps_scales(self) -> bool:
        """Return whether the weights are rounded onto the grid of a source."""
        return grid_of(self.weight_quantizer) is not None

    def scales(self, index: int, region: Region) -> dict[str, torch.Tensor] | None:
        """Return the scales that a region of the ``index``-th weight keeps; None if none."""
        grid = grid_of(self.weight_quantizer)
        if grid is None:
            return None
        kept = grid.scales[grid.regions.index(region)]
        if not self.grouped:
            return dict(kept)
        shape = {f.name: () for f in grid.fmt.fields if f.block == (WHOLE, WHOLE)}
        return {n: t[index].reshape(shape.get(n, t.shape[1:])) for n, t in kept.items()}


def _quantizer(found: object) -> TensorQuantizer:
    """Return an attribute of a module, which torch types as Tensor or Module."""
    assert isinstance(found, TensorQuantizer), type(found)
    return found


def set_expert_scales(layer: QuantLayer, scales: ExpertScales) -> None:
    """Let the layer's experts share their weight amax or not, and drop any present amax."""
    assert layer.grouped, layer.name
    quantizer = layer.weight_quantizer
    quantizer.reset_amax()
    reset_block_amax(quantizer)
    axis = 0 if scales is ExpertScales.PER_EXPERT else None
    quantizer.set_from_attribute_config(quantizer_attributes(layer.weight_format, axis))


def attach(
    model: nn.Module,
    plan: QuantPlan,
    weights: Sequence[LocalWeight],
    expert_scales: ExpertScales = ExpertScales.SHARED,
) -> list[QuantLayer]:
    """Convert ``model`` in place; return its quantized layers in the model's order.

    ``weights``: this rank's share of the plan's slots. Everything is checked before the first
    layer changes. Raises CoverageError for a layer that cannot carry the quantizer that the plan
    asks, QuantError for a model that records CUDA graphs.
    """
    refuse_cuda_graphs(model)
    register()
    chosen = _by_module(plan, weights)
    for name in chosen:
        _check(name, model.get_submodule(name))
    # ModelOpt prints the number of quantizers, on every rank.
    with redirect_stdout(StringIO()), fusion_kept(model), mode_state_kept(model):
        mtq.quantize(model, _ALL_OFF)
    for name, members in chosen.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(refuse_fp8)
        module.register_forward_pre_hook(refuse_capture)
        if (rows := members[0][1].rows) is not None:
            DenseRows(rows).put(module)
    return [_configure(model.get_submodule(n), m, expert_scales) for n, m in chosen.items()]


def refit(
    model: nn.Module,
    plan: QuantPlan,
    weights: Sequence[LocalWeight],
    expert_scales: ExpertScales = ExpertScales.SHARED,
) -> list[QuantLayer]:
    """Give modules that :func:`attach` converted new quantizers, of another plan.

    Modules of which the plan quantizes nothing keep theirs.
    """
    chosen = _by_module(plan, weights)
    for name in chosen:
        for kind in ("weight_quantizer", "input_quantizer"):
            quantizer = TensorQuantizer()
            quantizer.disable()
            model.get_submodule(name).add_module(kind, quantizer)
    return [_configure(model.get_submodule(n), m, expert_scales) for n, m in chosen.items()]


_Members = list[tuple[Decision, LocalWeight]]


def _by_module(plan: QuantPlan, weights: Sequence[LocalWeight]) -> dict[str, _Members]:
    chosen: dict[str, _Members] = {}
    for weight in weights:
        decision = plan.by_name[weight.slot]
        if decision.quantized:
            chosen.setdefault(weight.module, []).append((decision, weight))
    return chosen


def _check(name: str, module: nn.Module) -> None:
    if isinstance(module, QuantModule):
        raise CoverageError(
            f"{name} is a {type(module).__name__}, which ModelOpt quantized already: give a model "
            "without its quantizers; a checkpoint of such a model is read by prepare(..., "
            "checkpoint=...) or --megatron-load-path"
        )
    if type(module) not in QuantModuleRegistry:
        raise CoverageError(
            f"{name} is a {type(module).__name__}, which has no quantized class: "
            "build the model with the Transformer Engine layer spec, or exclude the weight"
        )


def _configure(module: nn.Module, members: _Members, scales: ExpertScales) -> QuantLayer:
    decisions, weights = zip(*members, strict=True)
    attributes = tuple(weight.attribute for weight in weights)
    layer = QuantLayer(module, decisions, attributes, weights[0].rows)
    if isinstance(module, QuantGroupedLinear):
        expected = tuple(f"weight{i}" for i in range(module.num_gemms))
        assert layer.attributes == expected, f"{layer.name} has {layer.attributes}"
    axis = 0 if layer.grouped and scales is ExpertScales.PER_EXPERT else None
    quantizer, fmt = layer.weight_quantizer, layer.weight_format
    quantizer.set_from_attribute_config(quantizer_attributes(fmt, axis))
    set_regions(quantizer, grids(_regions(weights[0], layer), fmt), layer.rounds)
    inputs = decisions[0].inputs
    if inputs is not None:
        layer.input_quantizer.set_from_attribute_config(quantizer_attributes(inputs))
    return layer


def _regions(weight: LocalWeight, layer: QuantLayer) -> tuple[Region, ...]:
    """Return the first weight's regions; all experts of a layer are cut alike."""
    rows, cols = layer.weights()[0].shape
    if not rows:
        raise LayoutError(
            f"{weight.slot}: tensor parallelism leaves a rank nothing but padding of it: take a "
            "smaller --tp, or leave it out of the recipe"
        )
    if weight.regions:
        assert sum(region.size[0] for region in weight.regions) == rows, weight
        return weight.regions
    whole = tuple(layer.decisions[0].slot.shape)
    assert whole == (rows, cols), f"a shard of {weight.slot} without its regions"
    return (whole_matrix(rows, cols),)
