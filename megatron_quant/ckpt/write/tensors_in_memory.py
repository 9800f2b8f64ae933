"""An export as tensors in memory, on every rank, for a server that is refitted."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import torch

from megatron_quant.ckpt.plan import ExportPlan, RankPart, StoredTensor
from megatron_quant.ckpt.write.encode_part import Produced
from megatron_quant.ckpt.write.rank_work import Produce
from megatron_quant.dist import Groups, gather, together

_Sent = tuple[str, tuple[slice, ...], torch.Tensor]
"""A file tensor's name, a box of it, and the bytes of that box, row-major."""


def in_memory(
    plan: ExportPlan, produce: Produce, groups: Groups, max_bytes: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every file tensor, in the order of the plan. Collective.

    Ranks make what they own and exchange it, about ``max_bytes`` of tensors at a time. Raises what
    ``produce`` raises, on every rank alike.
    """
    for batch in _batches(plan.targets, max_bytes):
        wanted = {id(target) for target in batch}
        own = [part for part in plan.parts_of(groups.rank) if id(part.target) in wanted]

        whole = {
            entry.name: torch.empty(entry.shape, dtype=entry.dtype)
            for target in batch
            for entry in target.entries
        }
        for of_rank in gather(together(groups, partial(_made, own, produce)), groups):
            for name, where, flat in of_rank:
                held = whole[name][where]
                held.copy_(flat.view(held.dtype).view(held.shape))
        yield from whole.items()


def _made(own: Sequence[RankPart], produce: Produce) -> list[_Sent]:
    return [_sent(item) for part in own for item in produce(part)]


def _sent(produced: Produced) -> _Sent:
    entry, box, values = produced
    where = tuple(slice(at, at + size) for at, size in zip(box.start, box.size, strict=True))
    flat = values.contiguous().cpu().reshape(-1).view(torch.uint8)  # float8 has no pickle
    return entry.name, where, flat


def _batches(targets: tuple[StoredTensor, ...], max_bytes: int) -> Iterator[list[StoredTensor]]:
    batch: list[StoredTensor] = []
    held = 0
    for target in targets:
        size = sum(prod(entry.shape) * entry.dtype.itemsize for entry in target.entries)
        if batch and held + size > max_bytes:
            yield batch
            batch, held = [], 0
        batch.append(target)
        held += size
    if batch:
        yield batch
