"""Let the ranks that ``torchrun`` started meet at a store, compare their settings, and join.

This works before there is a process group, and whatever state a group is in.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from megatron_quant.alike import difference
from megatron_quant.dist import Groups, is_lost, lost_ranks
from megatron_quant.errors import LostRankError, QuantError, RankError
from megatron_quant.faults import MINUTES, line_of, told

_RUNS, _MEETINGS, _FORWARDS = count(), count(), count()
_READ_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # between looks at whether another rank has failed
_GRACE_SECONDS = 15.0  # for a rank to notice by itself, or for torchrun to end it


def is_one_of_many() -> bool:
    """Return whether this process is one of several that ``torchrun`` or its like started.

    Raises RankError if it is one of several but cannot find the others.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return False
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or not size.isdecimal():
        raise RankError(
            f"WORLD_SIZE is {size}{f', but {missing[0]} is not set' if missing else ''}: start the "
            "ranks with torchrun, or unset WORLD_SIZE for one process"
        )
    return True


_Met = tuple[dist.Store, int, int]
_MET: list[_Met] = []
_MISSED: list[BaseException] = []
"""Why the ranks did not meet: nothing waits for that again."""


def _store(minutes: float = MINUTES) -> _Met:
    """Return the store, this rank and how many there are. The first call waits for all of them.

    Raises RuntimeError, torch's, where not all come within ``minutes``.
    """
    if _MISSED:
        raise RuntimeError("the ranks did not meet") from _MISSED[0]
    if not _MET:
        try:
            found = dist.rendezvous("env://", timeout=timedelta(minutes=minutes))
            store, rank, size = next(found)
        except BaseException as error:
            _MISSED.append(error)
            raise
        _MET.append((store, rank, size))
    return _MET[0]


def join(backend: str, minutes: float = MINUTES) -> None:
    """Make the default process group of all ranks; its collectives wait for ``minutes``."""
    timeout = timedelta(minutes=minutes)
    if is_one_of_many():
        try:
            store, rank, size = _store(minutes)
        except (RuntimeError, ValueError) as error:
            raise _not_all(minutes) from error
        store.set_timeout(timeout)
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=timeout)
    else:
        alone = dist.HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)


def check_started_alike(said: Mapping[str, str], minutes: float = MINUTES) -> None:
    """Raise RankError, on every rank, if ``said`` differs between ranks.

    It waits for all ranks but needs no process group: call it before anything that needs one.
    """
    if not is_one_of_many():
        return
    run = f"run{next(_RUNS)}"
    try:
        store, rank, size = _store(minutes)
        store.set_timeout(timedelta(minutes=minutes))
        store.set(f"{run}/{rank}", json.dumps(said))
        found = [json.loads(store.get(f"{run}/{other}")) for other in range(size)]
    except (RuntimeError, ValueError) as error:
        raise _not_all(minutes) from error
    share("", _READ_SECONDS)  # once all have read, the rank that keeps the store may end
    other = difference(found)
    if other is not None:
        raise RankError(f"the ranks were not started alike: {other}; start all with one command")


def _not_all(minutes: float) -> LostRankError:
    return LostRankError(
        f"not all of the {os.environ['WORLD_SIZE']} ranks came to {_address()} within "
        f"{minutes:g} minutes: see what the others printed, or raise "
        "--distributed-timeout-minutes"
    )


def share(said: str, seconds: float) -> dict[int, str]:
    """Return what each rank said, by rank; leave out ranks that are not here after ``seconds``.

    It works whatever has become of the others, and never waits for one that has ended.
    """
    try:
        if not is_one_of_many():
            return {0: said}
        store, rank, size = _store()
    except (RankError, RuntimeError, ValueError):
        return {_rank(): said}
    place, until = f"meeting{next(_MEETINGS)}", time.monotonic() + seconds
    keys = [f"{place}/{other}" for other in range(size)]
    try:
        store.set(keys[rank], said)
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(0.01)
        return {r: store.get(key).decode() for r, key in enumerate(keys) if store.check([key])}
    except RuntimeError:
        return {rank: said}  # the rank that kept the store has gone


@contextmanager
def forwards() -> Iterator[None]:
    """Run forwards, whose collectives are not ours, so that no rank waits for one that failed.

    A rank tells the others its error over the store. One that finds its connections closed by that
    raises RankError with it. One that still waits seconds later ends with status 1: a collective
    cannot be left. All ranks enter it together. Without the store of :func:`join` it does nothing.
    """
    if not _MET:
        yield
        return
    (store, rank, _), key, left = _store(), f"forwards{next(_FORWARDS)}", threading.Event()
    watch = threading.Thread(target=_end_after, args=(store, key, rank, left), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        first = _failed(store, key, rank, error)
        if first is error:
            raise
        raise first from error
    finally:
        left.set()
        watch.join(_LOOK_SECONDS)


def _failed(store: dist.Store, key: str, rank: int, error: BaseException) -> BaseException:
    """Tell the others of ``error``; the one of another rank instead, where that is its cause."""
    try:
        if not is_lost(error):
            bug = not isinstance(error, QuantError | KeyboardInterrupt)
            store.set(key, json.dumps([rank, line_of(error), bug]))
            return error
        if store.check([key]):
            return told(*json.loads(store.get(key)))
    except RuntimeError:  # whoever kept the store has gone
        return error
    return error if isinstance(error, QuantError) else lost_ranks()


def _end_after(store: dist.Store, key: str, rank: int, left: threading.Event) -> None:
    """End this process where another rank has failed and this one does not come back."""
    try:
        while not store.check([key]):
            if left.wait(_LOOK_SECONDS):
                return
        failed, line, _ = json.loads(store.get(key))
    except RuntimeError:
        return
    if not left.wait(_GRACE_SECONDS):
        if rank == (0 if failed else 1):
            said = f"rank {failed} failed: {line}; the others waited for it, and end"
            sys.stderr.write(f"[rank {rank}] megatron-quant: error: {said}\n")
            sys.stderr.flush()
        os._exit(1)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def start_ranks(minutes: float = MINUTES) -> Groups:
    """Join all ranks that ``torchrun`` started, over gloo; one process without torchrun.

    minutes: how long a rank waits for the slowest one.
    """
    if not dist.is_initialized() and is_one_of_many():
        join("gloo", minutes)
    return Groups(minutes=minutes)
