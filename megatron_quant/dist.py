"""The few collectives that this library needs. Each also works without a process group.

One rule keeps ranks from waiting for a failed one: an error between two of these calls is raised
through :func:`raise_together`, so every rank leaves at the same place.
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

    model: the process group of all of them. None is the default group, or a single process if
        torch.distributed is not initialized.
    device: where tensors must live for a collective (``cuda`` for NCCL, ``cpu`` for gloo).
    shards: the ranks that this one shares tensors with; None if no tensor is cut.
    minutes: how long a rank waits for the slowest one, also in groups made from this one.
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
    """The ranks that hold the other shards of a rank's tensors.

    dense: for the layers that every token passes (tensor parallel). experts: for experts (expert
    tensor parallel). replicas: the ranks that are given other tokens; None if that is not known.
    """

    dense: Groups
    experts: Groups
    replicas: "Replicas | None" = None


@dataclass(frozen=True)
class Replicas:
    """The ranks that are given other tokens than this one.

    dense: those with this rank's shards of the layers that every token meets (data parallel).
    experts: those with this rank's shards of its experts. others: those with other experts of the
    same layers (expert parallel), itself included.
    """

    dense: Groups
    experts: Groups
    others: Groups


@contextmanager
def _answered() -> Iterator[None]:
    """Raise LostRankError if the other ranks cannot be reached."""
    try:
        yield
    except RuntimeError as e:
        if not is_lost(e):
            raise
        raise lost_ranks() from e


def is_lost(error: BaseException) -> bool:
    """Return whether a collective failed because other ranks cannot be reached."""
    if isinstance(error, LostRankError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def lost_ranks() -> LostRankError:
    """Return the error of a rank that the others do not answer."""
    return LostRankError(
        "the other ranks do not answer: one of them has ended, or is slower than "
        "--distributed-timeout-minutes allows; see what the others printed, or raise it"
    )


def _all_reduce(flat: torch.Tensor, op: Any, groups: Groups) -> torch.Tensor:
    if groups.size == 1:
        return flat
    on_device = flat.to(groups.device)
    with _answered():
        dist.all_reduce(on_device, op=op, group=groups.model)
    return on_device.to(flat.device)


def max_reduce(flat: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return the elementwise maximum over the model's ranks; ``flat`` is equally long on all."""
    return _all_reduce(flat, dist.ReduceOp.MAX, groups)


def sum_reduce(flat: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return the elementwise sum over the model's ranks; ``flat`` is equally long on all."""
    return _all_reduce(flat, dist.ReduceOp.SUM, groups)


def ordered_sum(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return the elementwise sum over ranks, added in their order: the same bits on every rank.

    Each rank adds up one part of ``values``, whose shape is the same on all.
    """
    size = groups.size
    if size == 1:
        return values
    each = -(-values.numel() // size)
    sent = torch.zeros(size * each, dtype=values.dtype, device=groups.device)
    sent[: values.numel()] = values.flatten()
    received, parts = torch.empty_like(sent), list(torch.empty_like(sent).view(size, each))
    with _answered():
        dist.all_to_all_single(received, sent, group=groups.model)
        own, *others = received.view(size, each)
        for other in others:
            own += other
        dist.all_gather(parts, own, group=groups.model)
    return torch.cat(parts)[: values.numel()].view(values.shape).to(values.device)


def joined(values: torch.Tensor, dim: int, groups: Groups) -> torch.Tensor:
    """Return every rank's ``values``, of one shape, put together along ``dim`` in rank order."""
    if groups.size == 1:
        return values
    own = values.to(groups.device).contiguous()
    parts = [torch.empty_like(own) for _ in range(groups.size)]
    with _answered():
        dist.all_gather(parts, own, group=groups.model)
    return torch.cat(parts, dim).to(values.device)


def gather(value: T, groups: Groups) -> list[T]:
    """Return every rank's ``value``, in rank order, on every rank. For small picklable values."""
    if groups.size == 1:
        return [value]
    values: list[Any] = [None] * groups.size
    with _answered():
        dist.all_gather_object(values, value, group=groups.model)
    return values


def exchange(
    parts: Callable[[], Sequence[torch.Tensor]] | None, sizes: Sequence[int], groups: Groups
) -> torch.Tensor | None:
    """Send ``parts()`` (uint8 [n], one for each rank); return what the ranks sent to this one.

    parts: None on a rank that has failed. All ranks then get None, and so they do if ``parts``
    raises or memory runs out for what is sent or received. sizes: bytes that come from each rank;
    they are returned one after another. An error in ``parts`` is raised once the others know.
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


def broadcasts(
    own: torch.Tensor, sizes: Sequence[int], groups: Groups
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (rank, bytes) for every rank that has some to share, on every rank. Collective.

    own: this rank's bytes, uint8 [sizes[this rank]]. sizes: bytes of each rank. At most one other
    rank's bytes are held at a time.
    """
    for rank, size in enumerate(sizes):
        if size:
            yield rank, own if groups.size == 1 else _broadcast(own, rank, size, groups)


def _broadcast(own: torch.Tensor, source: int, size: int, groups: Groups) -> torch.Tensor:
    if source == groups.rank:
        sent = own.to(groups.device)
    else:
        sent = torch.empty(size, dtype=torch.uint8, device=groups.device)
    first = dist.get_global_rank(groups.model, source) if groups.model else source
    with _answered():
        dist.broadcast(sent, first, group=groups.model)
    return sent.cpu()


def raise_together(error: BaseException | None, groups: Groups) -> None:
    """Raise on every rank the error of the lowest rank that has one; do nothing if none has.

    A user's error (QuantError, OSError) is the same on all ranks. Any other error stays as it is on
    the rank that raised it; the others get a RankError that names that rank and the error's type.
    """
    own = None if error is None else fault_of(error)
    if error is not None and is_out_of_memory(error):
        _free(error)
    try:
        faults = gather(own, groups)
    except RankError:
        if error is None:
            raise
        raise error from None  # this rank reports its own error, not the others'
    if any(fault is not None for fault in faults):
        raise shared(error, faults, groups.rank)


def _free(error: BaseException) -> None:
    """Free what the failed work still holds: telling the others needs memory too."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def together(groups: Groups, work: Callable[[], T]) -> T:
    """Run ``work()`` on every rank; raise one rank's error, or Ctrl-C, on all.

    ``work`` must not wait for other ranks itself. See :func:`raise_together`.
    """
    error: BaseException | None = None
    try:
        result = work()
    except BaseException as e:
        error = e
    raise_together(error, groups)
    return result


class Meetings:
    """Lets ranks wait for one another within work that :func:`in_step` runs.

    Attributes:
        are_over: Whether a rank has failed, and the others know it.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups, self.are_over = groups, False

    def meet(self, value: T) -> list[T]:
        """Return every rank's ``value``, in rank order. Raises what another rank failed with."""
        try:
            raise_together(None, self._groups)
            return gather(value, self._groups)
        except BaseException:
            self.are_over = True
            raise


def in_step(groups: Groups, work: Callable[[Meetings], T]) -> T:
    """Run ``work`` on every rank as :func:`together` does; it may meet, equally often on all.

    A rank that fails says so where the others meet next.
    """
    meetings, error = Meetings(groups), None
    try:
        result = work(meetings)
    except BaseException as e:
        if meetings.are_over:
            raise
        error = e
    raise_together(error, groups)
    return result
