"""Ranks that put rows of tensors together, and none of which waits for one that failed."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from megatron_quant.ckpt.join import Join, Joint
from megatron_quant.ckpt.pipeline import Encoded
from megatron_quant.dist import Groups, Shards, exchange
from megatron_quant.errors import QuantError
from megatron_quant.models.spec import Domain

Pieces = Mapping[str, memoryview]
"""Bytes that a member encoded, by file tensor."""
_FAILED, _WELL = 0, 1


def join_all(
    batches: Sequence[tuple[Joint, ...]],
    rank: int,
    shards: Shards,
    encode: Callable[[tuple[Joint, ...]], Pieces],
    write: Callable[[tuple[Joint, ...], list[Encoded]], None],
) -> bool:
    """Exchange all ``batches`` (:func:`megatron_quant.ckpt.join.batches`); collective.

    encode: what this rank has of a batch. write: of the rows that it put together.

    What either of them raises is raised when nobody waits for this rank any more. Returns whether
    all is well; False where another rank failed, which will say so.
    """
    error: QuantError | OSError | None = None
    left: set[tuple[int, ...]] = set()
    for batch in batches:
        members = batch[0].members
        if members in left:
            continue
        pieces, well = None, error is None and not left
        try:
            pieces = encode(batch) if well else None
        except (QuantError, OSError) as e:
            error = e
        rows = _exchanged(batch, rank, pieces, _group(batch[0], shards))
        if rows is None:
            left.add(members)
            continue
        try:
            write(batch, rows)
        except (QuantError, OSError) as e:
            error = e
    if error is not None:
        raise error
    return not left


def _group(joint: Joint, shards: Shards) -> Groups:
    group = shards.dense if joint.domain is Domain.DENSE else shards.experts
    assert group.size == len(joint.members), "the plan's owners are not one group of ranks"
    return group


def _exchanged(
    batch: tuple[Joint, ...], rank: int, pieces: Pieces | None, group: Groups
) -> list[Encoded] | None:
    """This rank's rows; None where a member failed. pieces: None where this one did."""
    me = batch[0].members.index(rank)
    joins = [join for joint in batch for join in joint.joins]
    members = range(len(batch[0].members))
    parts = [_for_member(joins, me, to, pieces) for to in members]
    sizes = [1 + sum(_nbytes(join, me, of) for join in joins) for of in members]
    received = [part.numpy() for part in exchange(parts, sizes, group).split(sizes)]
    if any(part[0] != _WELL for part in received):
        return None
    return _joined(joins, me, received)


def _nbytes(join: Join, to: int, of: int) -> int:
    start, stop = join.rows(to)
    return (stop - start) * join.width(of)


def _for_member(joins: Sequence[Join], me: int, to: int, pieces: Pieces | None) -> torch.Tensor:
    """A byte that says how it went, and the member's rows of what this rank encoded."""
    sent = torch.empty(1 + sum(_nbytes(join, to, me) for join in joins), dtype=torch.uint8)
    sent[0] = _FAILED if pieces is None else _WELL
    if pieces is not None:
        data, at = sent.numpy(), 1
        for join in joins:
            if size := _nbytes(join, to, me):
                first = join.rows(to)[0] * join.width(me)
                data[at : at + size] = pieces[join.entry.name][first : first + size]
                at += size
    return sent


def _joined(joins: Sequence[Join], me: int, received: Sequence[np.ndarray]) -> list[Encoded]:
    at, found = [1] * len(received), list[Encoded]()
    for join in joins:
        box = join.box(me)
        if box is None:
            continue
        columns = []
        for of, data in enumerate(received):
            size = _nbytes(join, me, of)
            columns.append(data[at[of] : at[of] + size].reshape(box.size[0], join.width(of)))
            at[of] += size
        rows = np.concatenate(columns, axis=1).reshape(-1)
        found.append((join.entry, box, rows.data))
    return found
