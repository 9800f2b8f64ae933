"""Give a loaded model's quantizers the scales that its source was quantized with."""

from collections.abc import Mapping, Sequence

import torch

from megatron_quant.ckpt.plan import regions
from megatron_quant.ckpt.read import QuantizedCheckpoint, Scales, check_shared, kept_scales
from megatron_quant.formats import Region
from megatron_quant.layers import KeptGrid, QuantLayer
from megatron_quant.mcore.model.load import LiveModel
from megatron_quant.mcore.model.locate import LocalParam
from megatron_quant.models import Source


@torch.no_grad()
def keep_scales(
    layers: Sequence[QuantLayer], model: LiveModel, checkpoint: QuantizedCheckpoint
) -> None:
    """Make the layers round their weights onto the grids of ``checkpoint`` from now on.

    It reads the scales of this rank's shards. bf16 is exact enough to give the source's codes: it
    moves a value by at most 2^-9 of itself, so a code of 128 by a quarter, which rounds back.
    Raises CheckpointError if engines could not read the scales.
    """
    where = {local.param.name: local for local in model.local}
    together: dict[str, dict[str, Scales]] = {}
    for layer in layers:
        held = [_scales(where[d.slot.name], checkpoint) for d in layer.decisions]
        if layer.decisions[0].slot.fused:
            together.setdefault(layer.sharing, {}).update(held[0])
        of_region = [list(of_weight.values()) for of_weight in held]
        device = layer.weights()[0].device
        layer.keep(
            KeptGrid(
                layer.weight_format,
                tuple(region for _, region in _regions(where[layer.decisions[0].slot.name])),
                tuple(_stacked(s, layer.grouped, device) for s in zip(*of_region, strict=True)),
            )
        )
    for found in together.values():
        check_shared(found, checkpoint.path)


def _regions(local: LocalParam) -> tuple[tuple[Source, Region], ...]:
    return regions(local.param, local.shard_rank, local.shard_size)


def _scales(local: LocalParam, checkpoint: QuantizedCheckpoint) -> Mapping[str, Scales]:
    """Return the scales by source module, in the order of the regions."""
    found = {s.module: kept_scales(checkpoint, s.module, r) for s, r in _regions(local)}
    check_shared(found, checkpoint.path)
    return found


def _stacked(scales: Sequence[Scales], grouped: bool, device: torch.device) -> Scales:
    """Stack the scales of one region of each weight: [E, N_b, K_b] and [E, 1, 1] for experts."""
    if not grouped:
        (only,) = scales
        return {name: t.to(device) for name, t in only.items()}
    names = scales[0]
    stacks = {name: torch.stack([s[name] for s in scales]).to(device) for name in names}
    return {name: t if t.dim() > 1 else t.view(-1, 1, 1) for name, t in stacks.items()}
