"""Let ranks put rows of tensors together; none waits for a rank that failed."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from megatron_quant.ckpt.plan import Join, Joint
from megatron_quant.ckpt.write.pipeline import Encoded
from megatron_quant.dist import Groups, Shards, exchange
from megatron_quant.errors import RankError
from megatron_quant.models import Domain

Pieces = Mapping[str, memoryview]
"""The bytes that a member encoded, by file tensor."""


def join_all(
    batches: Sequence[tuple[Joint, ...]],
    rank: int,
    shards: Shards,
    encode: Callable[[tuple[Joint, ...]], Pieces],
    write: Callable[[tuple[Joint, ...], list[Encoded]], None],
) -> bool:
    """Exchange all ``batches`` (:func:`megatron_quant.ckpt.plan.row_joins.batches`); collective.

    encode: encodes what this rank has of a batch. write: writes the rows that it put together.

    An error of either is raised once nobody waits for this rank any more. Returns True if all went
    well, and False if another rank failed; that rank raises the error.
    """
    error: BaseException | None = None
    left: set[tuple[int, ...]] = set()
    for batch in batches:
        members = batch[0].members
        if members in left:
            continue
        well = error is None and not left
        message = partial(_message, batch, rank, encode) if well else None
        try:
            received = exchange(message, _sizes(batch, rank), _group(batch[0], shards))
        except RankError as e:
            raise error or e from None  # nobody waits: the others are gone
        except BaseException as e:
            error, received = e, None  # the members know it
        if received is None:
            left.add(members)
            continue
        try:
            write(batch, _joined(batch, rank, received))
        except BaseException as e:
            error = e
    if error is not None:
        raise error
    return not left


def _group(joint: Joint, shards: Shards) -> Groups:
    group = shards.dense if joint.domain is Domain.DENSE else shards.experts
    assert group.size == len(joint.members), "the plan's owners are not one group of ranks"
    return group


def _joins(batch: tuple[Joint, ...]) -> list[Join]:
    return [join for joint in batch for join in joint.joins]


def _sizes(batch: tuple[Joint, ...], rank: int) -> list[int]:
    """Return the bytes that come from each member."""
    members = batch[0].members
    me = members.index(rank)
    return [sum(_nbytes(join, me, of) for join in _joins(batch)) for of in range(len(members))]


def _nbytes(join: Join, to: int, of: int) -> int:
    start, stop = join.rows(to)
    return (stop - start) * join.width(of)


def _message(
    batch: tuple[Joint, ...], rank: int, encode: Callable[[tuple[Joint, ...]], Pieces]
) -> list[torch.Tensor]:
    """Return, for each member, its rows of what this rank encodes, uint8."""
    members, pieces = batch[0].members, encode(batch)
    me = members.index(rank)
    return [_for_member(_joins(batch), me, to, pieces) for to in range(len(members))]


def _for_member(joins: Sequence[Join], me: int, to: int, pieces: Pieces) -> torch.Tensor:
    sent = torch.empty(sum(_nbytes(join, to, me) for join in joins), dtype=torch.uint8)
    data, at = sent.numpy(), 0
    for join in joins:
        if size := _nbytes(join, to, me):
            first = join.rows(to)[0] * join.width(me)
            data[at : at + size] = pieces[join.entry.name][first : first + size]
            at += size
    return sent


def _joined(batch: tuple[Joint, ...], rank: int, received: torch.Tensor) -> list[Encoded]:
    """Put this rank's rows together from what the members sent."""
    me, sizes = batch[0].members.index(rank), _sizes(batch, rank)
    parts = [part.numpy() for part in received.split(sizes)]
    at, found = [0] * len(parts), list[Encoded]()
    for join in _joins(batch):
        box = join.box(me)
        if box is None:
            continue
        columns = []
        for of, data in enumerate(parts):
            size = _nbytes(join, me, of)
            columns.append(data[at[of] : at[of] + size].reshape(box.size[0], join.width(of)))
            at[of] += size
        rows = np.concatenate(columns, axis=1).reshape(-1)
        found.append((join.entry, box, rows.data))
    return found
