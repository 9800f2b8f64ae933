"""The few collectives that this library needs; each works without a process group.

One rule keeps ranks from waiting for one another: whatever one rank raises between two of these
calls, it raises through :func:`raise_together`, so every rank leaves at the same place.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_quant.errors import LostRankError, RankError
from megatron_quant.faults import MINUTES, fault_of, is_out_of_memory, shared

T = TypeVar("T")


@dataclass(frozen=True)
class Groups:
    """The ranks that hold one model together.

    model: process group of all of them; None is the default group, or a single process where
        torch.distributed is not initialized.
    device: where tensors must live for a collective (``cuda`` for NCCL, ``cpu`` for gloo).
    shards: those of them with whom this rank shares tensors; None where no tensor is cut.
    minutes: how long a rank waits for the slowest, in groups that are made of this one.
    """

    model: Any = None
    device: str = "cpu"
    shards: "Shards | None" = None
    minutes: float = MINUTES

    @property
    def rank(self) -> int:
        """Return this process's rank in the model's group."""
        return dist.get_rank(self.model) if dist.is_initialized() else 0

    @property
    def size(self) -> int:
        """Return how many ranks hold the model."""
        return dist.get_world_size(self.model) if dist.is_initialized() else 1


@dataclass(frozen=True)
class Shards:
    """The ranks among which a rank's tensors are cut, each of which holds another shard.

    dense: of the layers that every token meets (tensor parallel). experts: of experts (expert
    tensor parallel).
    """

    dense: Groups
    experts: Groups


@contextmanager
def _answered() -> Iterator[None]:
    """Raise LostRankError where the other ranks cannot be reached."""
    try:
        yield
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        raise LostRankError(
            "the other ranks do not answer: one of them has ended, or is slower than "
            "--distributed-timeout-minutes allows"
        ) from e


def _all_reduce(flat: torch.Tensor, op: Any, groups: Groups) -> torch.Tensor:
    if groups.size == 1:
        return flat
    on_device = flat.to(groups.device)
    with _answered():
        dist.all_reduce(on_device, op=op, group=groups.model)
    return on_device.to(flat.device)


def max_reduce(flat: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Elementwise maximum over the model's ranks; ``flat`` has the same length on all."""
    return _all_reduce(flat, dist.ReduceOp.MAX, groups)


def sum_reduce(flat: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Elementwise sum over the model's ranks; ``flat`` has the same length on all."""
    return _all_reduce(flat, dist.ReduceOp.SUM, groups)


def gather(value: T, groups: Groups) -> list[T]:
    """Return ``value`` of every rank, in rank order, on every rank. For small picklable values."""
    if groups.size == 1:
        return [value]
    values: list[Any] = [None] * groups.size
    with _answered():
        dist.all_gather_object(values, value, group=groups.model)
    return values


def exchange(
    parts: Callable[[], Sequence[torch.Tensor]] | None, sizes: Sequence[int], groups: Groups
) -> torch.Tensor | None:
    """Send ``parts()`` (uint8 [n], one for each rank) and get what the ranks have for this one.

    parts: None on a rank that has failed; then, and where ``parts`` raises or the memory for what
    is sent or received is not there, all ranks get None. sizes: bytes that come from each rank.
    Returns them after one another. What ``parts`` raises is raised once the others know.
    """
    error: BaseException | None = None
    try:
        if parts is not None:
            own = list(parts())
            sent = torch.cat(own).to(groups.device)
            counts = [part.numel() for part in own]
            received = sent.new_empty(sum(sizes))
    except BaseException as e:
        error = e
    well = torch.tensor([parts is not None and error is None], dtype=torch.uint8)
    all_well = _all_reduce(well, dist.ReduceOp.MIN, groups).item()
    if error is not None:
        raise error
    if not all_well:
        return None
    with _answered():
        dist.all_to_all_single(received, sent, list(sizes), counts, group=groups.model)
    return received.cpu()


def raise_together(error: BaseException | None, groups: Groups) -> None:
    """Raise on every rank the error of the lowest rank that has one; nothing where none has.

    A user's error (QuantError, OSError) is equal on all ranks. Anything else stays what it is on
    the rank that raised it, and is a RankError that names rank and type on the others.
    """
    own = None if error is None else fault_of(error)
    if error is not None and is_out_of_memory(error):
        _free(error)
    try:
        faults = gather(own, groups)
    except RankError:
        if error is None:
            raise
        raise error from None  # what ended this rank is its own error, whatever ended the others
    if any(fault is not None for fault in faults):
        raise shared(error, faults, groups.rank)


def _free(error: BaseException) -> None:
    """Let go of what the failed work still holds, so that telling the others finds memory."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def together(groups: Groups, work: Callable[[], T]) -> T:
    """Run ``work()`` on every rank; raise on all what one rank raises, Ctrl-C included.

    ``work`` must not wait for other ranks itself. See :func:`raise_together`.
    """
    error: BaseException | None = None
    try:
        result = work()
    except BaseException as e:
        error = e
    raise_together(error, groups)
    return result
