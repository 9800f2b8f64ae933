"""Produce each part that an export asks for: the live weight and its quantizer's scales."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from megatron_quant.ckpt.plan import RankPart
from megatron_quant.ckpt.write import Produce, Produced, produce, produce_cache_scale
from megatron_quant.formats import scales_of, tensor_scale
from megatron_quant.layers import CachedTensor, QuantLayer
from megatron_quant.mcore.model import LiveModel
from megatron_quant.models import CARRIED


def producer(
    model: LiveModel,
    layers: Sequence[QuantLayer],
    cached: Sequence[CachedTensor] = (),
    carried: Produce | None = None,
) -> Callable[[RankPart], Iterable[Produced]]:
    """Return a producer of parts: the live weight with its quantizers' amaxes.

    carried: makes the parts that the model lacks: vision towers, layers for speculation.
    """
    tensors = {local.param.name: local for local in model.local}
    amaxes = {
        decision.slot.name: (layer, index)
        for layer in layers
        for index, decision in enumerate(layer.decisions)
    }

    scales = {tensor.slot.name: tensor for tensor in cached}

    def of_part(part: RankPart) -> Iterable[Produced]:
        if part.param.role in CARRIED and part.param.name not in tensors:
            assert carried is not None, part.param.name
            return carried(part)
        if part.param.name in scales:
            return produce_cache_scale(part, scales[part.param.name].amax())
        local = model.tensor(tensors[part.param.name])
        if part.param.shift:
            local = local.detach().float() - part.param.shift
        if part.param.name not in amaxes:
            return produce(part, local)
        layer, index = amaxes[part.param.name]
        amax, inputs = layer.weight_amax(index), layer.input_amax()
        kept = layer.scales(index, part.region)
        if kept is not None:
            return produce(part, local, amax, inputs, scales=kept)
        stat = layer.block_stat(index, part.region)
        if layer.rounds:
            return produce(part, local, amax, inputs, scales=_found(part, local, amax, stat))
        return produce(part, local, amax, inputs, stat)

    return of_part


def _found(
    part: RankPart, local: Tensor, amax: Tensor | None, stat: Tensor | None
) -> dict[str, Tensor]:
    """Return the scales onto which the part was rounded, so that it keeps its codes."""
    w, fmt = part.region.take(local.detach()), part.target.scheme.weights
    assert fmt is not None
    dscale = tensor_scale(amax, fmt) if amax is not None and fmt.tensor_scale else None
    return scales_of(w, fmt, dscale, stat, (part.region.start[0], part.region.start[1]))
