"""The value of one scale of a quantized KV cache."""

from collections.abc import Iterator

import torch

from megatron_quant.ckpt.plan import Part
from megatron_quant.ckpt.produce import Produced
from megatron_quant.formats.amax import tensor_scale
from megatron_quant.formats.spec import get_format


def produce_cache_scale(part: Part, amax: torch.Tensor) -> Iterator[Produced]:
    """What ``part``, one of :func:`cache_tensors`, stores.

    amax: largest magnitude of the keys or values of the attention's heads, fp32 [], positive.
    """
    dscale = tensor_scale(amax.detach().reshape(()), get_format("fp8"))
    for piece in part.pieces:
        value = piece.stored.to_disk(dscale).reshape(piece.box.size)
        yield piece.entry, piece.box, value
