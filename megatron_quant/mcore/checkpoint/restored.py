"""Restore a quantized model as it was saved: weights and quantizers, without calibration."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_quant.calib import calibrate_weights, follow_weights
from megatron_quant.dist import Groups
from megatron_quant.errors import CheckpointError
from megatron_quant.layers import (
    CachedTensor,
    ExpertScales,
    QuantLayer,
    set_block_amax,
    set_expert_scales,
)
from megatron_quant.mcore.checkpoint import store
from megatron_quant.mcore.checkpoint.saved import Saved, parse_description
from megatron_quant.mcore.checkpoint.stored import is_quantized, open_stored
from megatron_quant.mcore.checkpoint.torch_dist import BACKEND, TorchDist
from megatron_quant.mcore.model import LiveModel
from megatron_quant.recipes import QuantPlan

_OF_INPUTS = ".input_quantizer._amax"


def read_saved(stored: TorchDist, groups: Groups) -> Saved:
    """Read a checkpoint's account of its quantization. Collective.

    Raises CheckpointError, on every rank alike, where it has none or it cannot be read.
    """
    if not is_quantized(stored):
        raise CheckpointError(
            f"{stored.path}: this checkpoint is not quantized: quantize it with megatron-quant "
            "quantize --megatron-load-path, --hf-model-id and --export-quant-cfg"
        )
    if not stored.is_own:
        raise CheckpointError(
            f"{stored.path} is quantized, and no checkpoint of format {BACKEND}: save it as "
            f"{BACKEND} (--ckpt-format)"
        )
    return parse_description(stored, store.read_description(stored, groups))


def open_saved(directory: Path, groups: Groups) -> Saved:
    """Open ``directory`` and read how the checkpoint is quantized. Collective.

    Raises CheckpointError as :func:`open_stored` and :func:`read_saved`.
    """
    return read_saved(open_stored(directory, groups), groups)


def restore(
    model: LiveModel,
    layers: Sequence[QuantLayer],
    cached: Sequence[CachedTensor],
    plan: QuantPlan,
    saved: Saved,
    scales: ExpertScales,
) -> None:
    """Fill the model's weights and quantizers from the checkpoint. Collective.

    layers, cached: as attached with the expert scales of ``saved``. scales: the wanted expert
    scales. If they differ from those of ``saved``, the experts' weight scales are found again from
    the loaded weights, as if the model had been quantized so. Raises what :func:`store.load` does.
    """
    inputs = not saved.in_training or any(_OF_INPUTS in key for key in saved.stored.shapes)
    _reserve(layers, cached, inputs)
    store.load(model.chunks, saved.stored, model.groups)
    follow_weights(layers, model.groups)
    if scales is not ExpertScales(saved.expert_scales):
        _convert(layers, plan, model.groups, scales)


def _reserve(layers: Sequence[QuantLayer], cached: Sequence[CachedTensor], inputs: bool) -> None:
    """Give the quantizers everything that a calibration would, in the right shapes."""
    for layer in layers:
        device = layer.weights()[0].device
        shape = (len(layer.decisions), 1, 1) if layer.per_expert else ()
        layer.weight_quantizer.amax = torch.ones(shape, device=device)
        if layer.static_inputs and inputs:
            layer.input_quantizer.amax = torch.ones((), device=device)
        if layer.keeps_blocks:
            set_block_amax(layer.weight_quantizer, torch.zeros(_stat_shape(layer), device=device))
    for tensor in cached:
        tensor.set_amax(1.0)


def _stat_shape(layer: QuantLayer) -> tuple[int, ...]:
    fmt = layer.weight_format
    assert fmt.stat_block is not None
    touched = [region.touched(fmt.stat_block) for region in layer.regions]
    shape = (sum(len(rows) for rows, _ in touched), len(touched[0][1]), fmt.stat_parts)
    return (len(layer.decisions), *shape) if layer.grouped else shape


def _convert(
    layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups, scales: ExpertScales
) -> None:
    experts = [layer for layer in layers if layer.grouped]
    for layer in experts:
        set_expert_scales(layer, scales)
    decisions = tuple(d for d in plan.decisions if d.slot.expert is not None)
    calibrate_weights(experts, replace(plan, decisions=decisions), groups)
