"""Make one scale of a quantized KV cache."""

from collections.abc import Iterator

import torch

from megatron_quant.ckpt.plan import RankPart
from megatron_quant.ckpt.write.encode_part import Produced
from megatron_quant.formats import get_format, tensor_scale


def produce_cache_scale(part: RankPart, amax: torch.Tensor) -> Iterator[Produced]:
    """Yield the tensors of ``part``, one of :func:`cache_tensors`.

    amax: largest magnitude of the keys or values of the attention's heads, fp32 [], positive.
    """
    dscale = tensor_scale(amax.detach().reshape(()), get_format("fp8"))
    for piece in part.pieces:
        value = piece.stored.to_disk(dscale).reshape(piece.box.size)
        yield piece.entry, piece.box, value
