"""Write a quantized checkpoint in another dialect: the same codes and scales under other names.

Nothing is decoded or rounded again: elements, zero points and block scales keep their values. A
tensor scale may move by one unit in the last place if the other dialect stores its inverse.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_quant.ckpt.dialects import PLAIN, SHAPE
from megatron_quant.ckpt.plan import Piece, RankPart
from megatron_quant.ckpt.read import QuantizedCheckpoint
from megatron_quant.ckpt.write import Produced
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import get_format
from megatron_quant.models import CARRIED, Domain, Parallel, Param, Role, Source
from megatron_quant.recipes import Decision, QuantPlan, Slot

_KEEPING_CODES = (Role.LINEAR, *CARRIED, Role.OUTPUT)
"""Roles of linears that may be quantized in a source, and then are in the export too."""


def whole_tensors(params: tuple[Param, ...]) -> tuple[Param, ...]:
    """Take ``params`` apart: every Hugging Face tensor becomes an unfused, uncut parameter."""
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
    """Return the checkpoint's own decision on each of ``params`` (whole tensors).

    Raises CheckpointError if nothing in it is quantized, and FormatError for a format that can be
    read but not written.
    """
    if checkpoint.dialect is None:
        raise CheckpointError(
            f"{checkpoint.path} is not quantized: quantize it first, "
            "or give the directory of an export"
        )
    decisions = []
    for param in params:
        (source,) = param.sources
        stored = checkpoint.modules.get(source.module) if _is_weight(source) else None
        if stored is not None and param.role not in _KEEPING_CODES:
            raise CheckpointError(
                f"{checkpoint.path}: {source.module} is quantized, but other dialects cannot store "
                f"a quantized {param.role.value}; quantize this checkpoint instead"
            )
        is_linear = param.role is Role.LINEAR or (stored and param.role is not Role.OUTPUT)
        slot = Slot(
            name=param.name,
            sources=(source.module,),
            shape=param.shape,
            fixed="" if is_linear else param.role.value,
            called=param.called,
        )
        if stored is not None:  # engines run only this one
            get_format(stored.weights.name, stored.weights.group_size)
        weights, inputs = (stored.weights, stored.inputs) if stored else (None, None)
        decisions.append(
            Decision(slot=slot, rule=checkpoint.dialect.name, weights=weights, inputs=inputs)
        )
    return QuantPlan(checkpoint.dialect.name, tuple(decisions), checkpoint.kv_cache)


def _is_weight(source: Source) -> bool:
    return source.name.endswith(".weight")


def transcode(part: RankPart, checkpoint: QuantizedCheckpoint) -> Iterator[Produced]:
    """Yield the tensors of ``part`` (a whole tensor), made from those in ``checkpoint``."""
    fields = _fields(part, checkpoint)
    for piece in part.pieces:
        if piece.stored.field not in fields:
            raise CheckpointError(
                f"{checkpoint.path} has nothing to make {piece.entry.name} of; quantize the "
                "source checkpoint instead"
            )
        value = piece.stored.to_disk(fields[piece.stored.field])
        yield piece.entry, piece.box, _cast(value, piece).reshape(piece.box.size)


def _fields(part: RankPart, checkpoint: QuantizedCheckpoint) -> dict[str, torch.Tensor]:
    source = part.target.source
    if part.param.role is Role.CACHE:
        attention = part.param.name.rpartition(".")[0]
        stored = {f"{attention}.{s.suffix}": s for s in checkpoint.cache_scales}
        return {s.field: s.from_disk(checkpoint.raw(name)) for name, s in stored.items()}
    if part.target.scheme.weights is None:
        return {PLAIN: checkpoint.raw(source.name)}
    return {SHAPE: torch.tensor(source.shape), **checkpoint.fields(source.module)}


def _cast(value: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Cast ``value`` to the dtype of its entry; CheckpointError if that would round it."""
    cast = value.to(piece.entry.dtype)
    if piece.stored.field == PLAIN or cast.dtype == value.dtype:
        return cast
    if not torch.equal(cast.to(value.dtype), value):
        raise CheckpointError(
            f"{piece.entry.name} would be {cast.dtype}, which cannot hold the {value.dtype} "
            "scales of the source; quantize the source checkpoint instead"
        )
    return cast
