"""Multi-rank tests whose ranks start in milliseconds.

    def total(x):                      # a function of a module: it travels by name
        t = torch.tensor([x + dist.get_rank()])
        dist.all_reduce(t)
        return t.item()

    def test_total(ranks):
        assert ranks(2, total, 10) == [21, 21]
        assert [type(e) for e in ranks.errors(2, fails_on_rank_1)] == [..., ValueError]

One process, the nursery, imports torch, Transformer Engine, Megatron and ModelOpt once (the CPU
room activated); every rank is a fork of it. In a rank, torch.distributed is initialized (gloo),
RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, torch has one
thread, and stdout and stderr go to a file that is shown when the test fails. Arguments and return
values are pickled by value. An exception in a rank ends that rank alone; the others go on, and
usually meet a closed connection at their next collective.

``ranks(world, function, *args, timeout=180)`` raises RankError, which names each rank's exception.
``ranks.errors(world, function, *args)`` returns each rank's exception, or None.
Both raise RankTimeout, with each rank's stack, when not all ranks end in time.
"""

import importlib
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.dist.nursery import Outcome, Task, run_ranks
from tests.host import ready

TIMEOUT_S = 180.0
_LOG_CHARS = 4000
PRELOADED = ["megatron.core.models.gpt.gpt_layer_specs", "modelopt.torch.quantization"]


class RankError(Exception):
    """At least one rank raised. ``errors`` holds each rank's exception or None, in rank order."""

    def __init__(self, message: str, errors: Sequence[Exception | None]) -> None:
        super().__init__(message)
        self.errors = list(errors)


class RankTimeout(RankError):
    """Not all ranks ended in time; they were killed."""


class Ranks:
    """Runs functions on gloo ranks; see the top of this file."""

    def __init__(self) -> None:
        self._connection, other = Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._connection.close()
            _nursery(other)
        other.close()

    def __call__(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: object,
        timeout: float = TIMEOUT_S,
    ) -> list[Any]:
        """``function(*args)`` on every rank; its return values in rank order."""
        outcomes = self._run(world_size, function, args, timeout)
        if any(o.error is not None for o in outcomes):
            raise RankError(_report(outcomes), [o.error for o in outcomes])
        return [o.value for o in outcomes]

    def errors(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: object,
        timeout: float = TIMEOUT_S,
    ) -> list[Exception | None]:
        """``function(*args)`` on every rank; what each raised, None where it returned."""
        return [o.error for o in self._run(world_size, function, args, timeout)]

    def close(self) -> None:
        """End the nursery, and ranks that still run."""
        self._connection.close()
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)

    def _run(
        self, world_size: int, function: Callable[..., Any], args: Sequence[object], timeout: float
    ) -> list[Outcome]:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            call = pickle.dumps((function, args))
            self._connection.send(Task(Path(folder), world_size, call, timeout))
            reply = self._connection.recv()
        if isinstance(reply, str):
            raise RuntimeError(f"the nursery did not start:\n{reply}")
        if any(o.timed_out for o in reply):
            late = [o.rank for o in reply if o.timed_out]
            message = f"ranks {late} did not end within {timeout:g} s\n{_report(reply)}"
            raise RankTimeout(message, [o.error for o in reply])
        return reply


def _report(outcomes: Sequence[Outcome]) -> str:
    """One line per rank that raised, the end of what each printed, the first one's traceback."""
    raised = [o for o in outcomes if o.error is not None]
    lines = [f"rank {o.rank}: {type(o.error).__name__}: {o.error}" for o in raised]
    logs = [f"--- rank {o.rank} printed\n{o.log[-_LOG_CHARS:]}" for o in raised if o.log]
    traces = [f"--- rank {o.rank}\n{o.trace}" for o in raised if o.trace][:1]
    return "\n".join(lines + logs + traces)


def _nursery(connection: Connection) -> None:
    """The life of the nursery process; does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        _import_everything_or_reply(connection)
        while True:
            connection.send(run_ranks(connection.recv()))
    except (EOFError, BrokenPipeError, SystemExit):
        pass
    finally:
        os._exit(0)


def _import_everything_or_reply(connection: Connection) -> None:
    try:
        ready()
        for name in PRELOADED:
            importlib.import_module(name)
    except Exception:
        connection.recv()
        connection.send(traceback.format_exc())
        sys.exit()
