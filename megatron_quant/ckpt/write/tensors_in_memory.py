"""Make an export's tensors in memory, on every rank, to refit a server."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from megatron_quant.ckpt.plan import ExportPlan, RankPart, StoredTensor
from megatron_quant.ckpt.write.encode_part import Produced
from megatron_quant.ckpt.write.rank_work import Produce
from megatron_quant.dist import Groups, gather, together
from megatron_quant.models import Box

_Sent = tuple[str, Box, torch.Tensor]
"""A file tensor's name, a box of it, and the box's bytes, row-major."""


def in_memory(
    plan: ExportPlan, produce: Produce, groups: Groups, max_bytes: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every file tensor, in the order of the plan. Collective.

    Ranks make what they own and exchange it, about ``max_bytes`` of tensors at a time. An error of
    ``produce`` is raised on every rank alike.
    """
    own_of: dict[StoredTensor, list[RankPart]] = {}
    for part in plan.parts_of(groups.rank):
        own_of.setdefault(part.target, []).append(part)
    for batch in _batches(plan.targets, max_bytes):
        own = [part for target in batch for part in own_of.get(target, ())]
        whole = {
            entry.name: torch.empty(entry.shape, dtype=entry.dtype)
            for target in batch
            for entry in target.entries
        }
        for of_rank in gather(together(groups, partial(_made, own, produce)), groups):
            for name, box, flat in of_rank:
                held = whole[name][box.index]
                held.copy_(flat.view(held.dtype).view(held.shape))
        yield from whole.items()


def _made(own: Sequence[RankPart], produce: Produce) -> list[_Sent]:
    return [_sent(item) for part in own for item in produce(part)]


def _sent(produced: Produced) -> _Sent:
    entry, box, values = produced
    flat = values.contiguous().cpu().reshape(-1).view(torch.uint8)  # float8 has no pickle
    return entry.name, box, flat


def _batches(targets: tuple[StoredTensor, ...], max_bytes: int) -> Iterator[list[StoredTensor]]:
    batch: list[StoredTensor] = []
    held = 0
    for target in targets:
        size = sum(entry.nbytes for entry in target.entries)
        if batch and held + size > max_bytes:
            yield batch
            batch, held = [], 0
        batch.append(target)
        held += size
    if batch:
        yield batch
