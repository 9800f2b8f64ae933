"""Produce each part that an export asks for: the live weight and its quantizer's scales."""

from collections.abc import Callable, Iterable, Sequence

from megatron_quant.ckpt.plan import RankPart
from megatron_quant.ckpt.write import Produce, Produced, produce, produce_cache_scale
from megatron_quant.layers import CachedTensor, QuantLayer
from megatron_quant.mcore.model import LiveModel
from megatron_quant.models import Role


def producer(
    model: LiveModel,
    layers: Sequence[QuantLayer],
    cached: Sequence[CachedTensor] = (),
    drafts: Produce | None = None,
) -> Callable[[RankPart], Iterable[Produced]]:
    """Return a producer of parts: the live weight with its quantizers' amaxes.

    drafts: makes the parts of layers for speculation, which the model lacks.
    """
    tensors = {local.param.name: local for local in model.local}
    amaxes = {
        decision.slot.name: (layer, index)
        for layer in layers
        for index, decision in enumerate(layer.decisions)
    }

    scales = {tensor.slot.name: tensor for tensor in cached}

    def of_part(part: RankPart) -> Iterable[Produced]:
        if part.param.role is Role.DRAFT:
            assert drafts is not None, part.param.name
            return drafts(part)
        if part.param.name in scales:
            return produce_cache_scale(part, scales[part.param.name].amax())
        local = model.tensor(tensors[part.param.name])
        if part.param.name not in amaxes:
            return produce(part, local)
        layer, index = amaxes[part.param.name]
        amax, inputs = layer.weight_amax(index), layer.input_amax()
        kept = layer.scales(index, part.region)
        if kept is not None:
            return produce(part, local, amax, inputs, scales=kept)
        return produce(part, local, amax, inputs, layer.block_stat(index, part.region))

    return of_part
