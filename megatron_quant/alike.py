"""Ranks that compare what they are about to do, before any of it is done."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from megatron_quant.dist import Groups, gather, raise_together, together
from megatron_quant.errors import RankError
from megatron_quant.faults import one_line

T = TypeVar("T")
_LONGEST = 120


def check_alike(groups: Groups, **said: str) -> None:
    """Raise RankError, on every rank, where ``said`` is not the same on all. Collective.

    said: by the words that a person knows it by, ``_`` for a space; a digest or a value.
    """
    named = {name.replace("_", " "): value for name, value in said.items()}
    other = difference(gather(named, groups))
    if other is not None:
        raise RankError(
            f"the ranks would not do the same: {other}; give all hosts the same flags and files"
        )


def difference(said: Sequence[Mapping[str, str]]) -> str | None:
    """Return where the ranks, in order, differ, and who has what; None where all agree."""
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
    """Return ``rank 3``, ``ranks 0, 2-5``, of ranks in rising order."""
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
    """Run ``work()`` on the first rank of each host, as ``torchrun`` counts them. Collective.

    Every rank gets what that of its own host found, a small picklable value. What one rank raises
    is raised on all. A rank without LOCAL_RANK is the first of its host.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    found = gather(together(groups, lambda: [work()] if first else []), groups)
    error = None if found[0] else RankError("LOCAL_RANK is 0 on no rank of the first host")
    raise_together(error, groups)
    return [of_rank[0] for of_rank in found[: groups.rank + 1] if of_rank][-1]
