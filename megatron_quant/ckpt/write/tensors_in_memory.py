"""Make an export's tensors in memory, to refit a server."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from math import prod

import torch

from megatron_quant.ckpt.plan import ExportPlan, Piece, RankPart, Slab, with_slabs
from megatron_quant.ckpt.storage import TensorEntry
from megatron_quant.ckpt.write.rank_work import Produce, made
from megatron_quant.dist import Groups, broadcasts, exchange, together

_Tensors = dict[str, torch.Tensor]
_Share = list[RankPart | Slab]
"""The parts of a batch of tensors that one rank owns."""
_Unit = tuple[TensorEntry, ...]
"""What stores one tensor, or a stack of experts."""


def in_memory(
    plan: ExportPlan,
    produce: Produce,
    groups: Groups,
    max_bytes: int,
    to: Sequence[int] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every stored tensor, in the order of the model. Collective.

    Ranks make what they own and send it on, ``max_bytes`` of tensors at a time; a larger tensor
    travels alone. A rank holds at most three times as much: what it made, what others sent, and the
    tensors that are put together of both.

    to: the ranks that yield tensors; the others yield nothing. None for all. Every rank iterates to
    the end. An error of ``produce`` is raised on every rank alike.
    """
    owned: dict[_Unit, _Share] = {target.in_files: [] for target in plan.targets}
    for part in with_slabs(plan.parts):
        owned[part.entries].append(part)
    for batch in _batches(owned, max_bytes):
        shares: list[_Share] = [[] for _ in range(groups.size)]
        for unit in batch:
            for part in owned[unit]:
                shares[part.owner].append(part)
        kept = batch if to is None or groups.rank in to else ()
        whole, own = together(groups, partial(_made, kept, shares[groups.rank], produce))
        _fill(whole, _delivered(own, shares, groups, to))
        del own
        for name in list(whole):
            yield name, whole.pop(name)


def _made(batch: Iterable[_Unit], share: _Share, produce: Produce) -> tuple[_Tensors, torch.Tensor]:
    """Return tensors of ``batch`` to be filled, and the bytes of this rank's ``share``."""
    entries = [entry for unit in batch for entry in unit]
    whole = {entry.name: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries}
    own = torch.empty(_nbytes(share), dtype=torch.uint8)
    values = (value for part in share for value in made(part, produce))
    for (piece, start, stop), (entry, box, value) in zip(_places(share), values, strict=True):
        assert (entry.name, box) == (piece.entry.name, piece.box), f"{entry.name}: not the plan's"
        own[start:stop] = value.contiguous().reshape(-1).view(torch.uint8)
    return whole, own


def _fill(whole: _Tensors, delivered: Iterable[tuple[_Share, torch.Tensor]]) -> None:
    for share, flat in delivered:
        for piece, start, stop in _places(share):
            box = whole[piece.entry.name][piece.box.index]
            box.copy_(flat[start:stop].view(box.dtype).view(box.shape))


def _places(share: _Share) -> Iterator[tuple[Piece, int, int]]:
    """Yield every piece of ``share``, and where its bytes start and stop among the share's."""
    at = 0
    for part in share:
        for piece in part.pieces:
            start, at = at, at + prod(piece.box.size) * piece.entry.dtype.itemsize
            yield piece, start, at


def _nbytes(share: _Share) -> int:
    return max((stop for _, _, stop in _places(share)), default=0)


def _delivered(
    own: torch.Tensor, shares: Sequence[_Share], groups: Groups, to: Sequence[int] | None
) -> Iterator[tuple[_Share, torch.Tensor]]:
    """Yield every rank's share and its bytes, on the ranks of ``to``."""
    sizes = [_nbytes(share) for share in shares]
    if to is None:
        yield from ((shares[rank], flat) for rank, flat in broadcasts(own, sizes, groups))
        return
    for rank in to:
        parts = [own if to_rank == rank else own[:0] for to_rank in range(groups.size)]
        expected = sizes if rank == groups.rank else [0] * groups.size
        received = exchange(partial(list, parts), expected, groups)
        assert received is not None, "every rank has its share"
        if rank == groups.rank:
            yield from zip(shares, received.split(sizes), strict=True)


def _batches(units: Iterable[_Unit], max_bytes: int) -> Iterator[list[_Unit]]:
    batch: list[_Unit] = []
    held = 0
    for unit in units:
        size = sum(entry.nbytes for entry in unit)
        if batch and held + size > max_bytes:
            yield batch
            batch, held = [], 0
        batch.append(unit)
        held += size
    if batch:
        yield batch
