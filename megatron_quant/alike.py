"""Compare what the ranks are about to do, before any of them does it."""

import os
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeVar

import torch

from megatron_quant.dist import Groups, exchange, gather, together
from megatron_quant.errors import RankError
from megatron_quant.faults import one_line

T = TypeVar("T")
_LONGEST = 120


def check_alike(groups: Groups, **said: str) -> None:
    """Raise RankError, on every rank, if ``said`` differs between ranks. Collective.

    said: digests or values, by the words that a message uses, with ``_`` for a space.
    """
    named = {name.replace("_", " "): value for name, value in said.items()}
    other = difference(gather(named, groups))
    if other is not None:
        raise RankError(
            f"the ranks would not do the same: {other}; give all hosts the same flags and files"
        )


def difference(said: Sequence[Mapping[str, str]]) -> str | None:
    """Return the first value that differs and which ranks have what; None if all agree."""
    names = dict.fromkeys(name for of_rank in said for name in of_rank)
    for name in names:
        having: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(said):
            having.setdefault(of_rank.get(name, "not said"), []).append(rank)
        if len(having) > 1:
            each = [f"{_short(value)} on {ranks_named(ranks)}" for value, ranks in having.items()]
            return f"{name} is {', '.join(each[:3])}{', and others' if len(each) > 3 else ''}"
    return None


def ranks_named(ranks: Sequence[int]) -> str:
    """Return ``rank 3`` or ``ranks 0, 2-5``; ``ranks`` must be in rising order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    listed = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def _short(value: str) -> str:
    text = one_line(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def once_a_host(groups: Groups, work: Callable[[], T]) -> T:
    """Run ``work()`` on one rank per host, the first by LOCAL_RANK. Collective.

    Returns on every rank what its own host's rank returned, a small picklable value. An error of
    one rank is raised on all.
    """
    firsts = _first_ranks(groups)
    own = together(groups, lambda: [work()] if firsts[groups.rank] == groups.rank else [])
    return gather(own, groups)[firsts[groups.rank]][0]


def ids_once_a_host(
    groups: Groups, work: Callable[[], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """Run :func:`once_a_host` for int64 tensors, which travel within their host alone."""
    firsts = _first_ranks(groups)
    first = firsts[groups.rank]
    own = together(groups, lambda: list(work()) if first == groups.rank else [])
    if groups.size == 1:
        return own
    shapes = gather([tuple(ids.shape) for ids in own], groups)[first]
    counts = [prod(shape) for shape in shapes]
    nothing = torch.empty(0, dtype=torch.uint8)

    def parts() -> list[torch.Tensor]:
        flat = [ids.contiguous().flatten() for ids in own]
        sent = torch.cat(flat).view(torch.uint8) if flat else nothing
        return [sent if source == groups.rank else nothing for source in firsts]

    sizes = [0] * groups.size
    sizes[first] = sum(counts) * torch.int64.itemsize
    # A rank that fails in it tells the others, which then wait for nothing.
    received = together(groups, lambda: exchange(parts, sizes, groups))
    assert received is not None, "every rank had parts"
    found = received.view(torch.int64).split(counts)
    return [ids.view(shape) for ids, shape in zip(found, shapes, strict=True)]


def _first_ranks(groups: Groups) -> list[int]:
    """Return, by rank, the first rank of the same host: local ranks rise within one. Collective."""
    local = gather(_local_rank(), groups)
    firsts = [0]
    for rank in range(1, groups.size):
        firsts.append(firsts[-1] if local[rank] > local[rank - 1] else rank)
    return firsts


def _local_rank() -> int:
    text = os.environ.get("LOCAL_RANK", "")
    return int(text) if text.isdecimal() else 0
