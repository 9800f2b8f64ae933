"""A quantized checkpoint in another dialect: the same codes and scales under other names.

Nothing is decoded and rounded again: elements and block scales keep their bytes. A tensor scale
that the other dialect stores as its inverse may move by one unit in the last place.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_quant.ckpt.dialects.base import SHAPE
from megatron_quant.ckpt.plan import Part
from megatron_quant.ckpt.produce import Produced
from megatron_quant.ckpt.quantized import QuantizedCheckpoint
from megatron_quant.errors import CheckpointError
from megatron_quant.models.spec import Domain, Parallel, Param, Role
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot


def whole_tensors(params: tuple[Param, ...]) -> tuple[Param, ...]:
    """``params`` taken apart: every Hugging Face tensor as an unfused, uncut parameter."""
    return tuple(
        replace(
            param,
            name=source.name,
            sources=(source,),
            shape=source.shape,
            parallel=Parallel.REPLICATED,
            domain=Domain.DENSE,
            groups=0,
            expert=None,
        )
        for param in params
        for source in param.sources
    )


def plan_of(checkpoint: QuantizedCheckpoint, params: tuple[Param, ...]) -> QuantPlan:
    """What the checkpoint's own config decided on each of ``params`` (whole tensors).

    Raises CheckpointError where nothing in it is quantized.
    """
    if checkpoint.dialect is None:
        raise CheckpointError(
            f"{checkpoint.directory} is not quantized: quantize it first, "
            "or give the directory of an export"
        )
    decisions = []
    for param in params:
        (source,) = param.sources
        fixed = "" if param.role is Role.LINEAR else param.role.value
        slot = Slot(param.name, (source.module,), param.shape, fixed)
        stored = None if fixed else checkpoint.modules.get(source.module)
        weights, inputs = (stored.weights, stored.inputs) if stored else (None, None)
        decisions.append(Decision(slot, checkpoint.dialect.name, weights, inputs))
    return QuantPlan(checkpoint.dialect.name, tuple(decisions))


def transcode(part: Part, checkpoint: QuantizedCheckpoint) -> Iterator[Produced]:
    """What ``part`` (a whole tensor) stores, from how ``checkpoint`` stores it."""
    source = part.target.source
    fields: dict[str, torch.Tensor] = {SHAPE: torch.tensor(source.shape)}
    if part.target.scheme.weights is None:
        fields = {piece.stored.field: checkpoint.raw(source.name) for piece in part.pieces}
    else:
        for stored in checkpoint.stored(source.module):
            value = checkpoint.raw(f"{source.module}.{stored.suffix}")
            fields[stored.field] = stored.from_disk(value)
    for piece in part.pieces:
        value = piece.stored.to_disk(fields[piece.stored.field]).to(piece.entry.dtype)
        yield piece.entry, piece.box, value.reshape(piece.box.size)
