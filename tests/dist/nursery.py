"""Forks the ranks of one run, waits for them, and collects what they return."""

import datetime
import faulthandler
import gc
import multiprocessing.util
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_STACKS_S = 1.0  # for a late rank to write its stacks


@dataclass(frozen=True)
class Task:
    """A function to run: ``call`` is the pickled (function, args)."""

    folder: Path
    world_size: int
    call: bytes
    timeout: float


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: its value, or its error with traceback and what it printed."""

    rank: int
    value: Any = None
    error: Exception | None = None
    trace: str = ""
    log: str = ""
    timed_out: bool = False


def run_ranks(task: Task) -> list[Outcome]:
    """Fork ``task.world_size`` ranks and wait until all have ended or the time is over."""
    gc.freeze()  # a collection in a rank does not copy the pages of what was imported
    port = _free_port()
    pids = [_fork(task, rank, port) for rank in range(task.world_size)]
    late = _wait(dict(enumerate(pids)), time.monotonic() + task.timeout)
    return [_outcome(task, rank, rank in late) for rank in range(task.world_size)]


def _fork(task: Task, rank: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _rank(task, rank, port)
            multiprocessing.util._exit_function()  # the processes that a save leaves behind
        finally:
            os._exit(0)
    return pid


def _wait(running: dict[int, int], deadline: float) -> set[int]:
    """Wait for {rank: pid}; the ranks that had to be killed."""
    parent = os.getppid()
    try:
        while running and time.monotonic() < deadline and os.getppid() == parent:
            for rank, pid in list(running.items()):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del running[rank]
            time.sleep(0.005)
    finally:
        _kill(list(running.values()))
    return set(running)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
    if pids:
        time.sleep(_STACKS_S)
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _outcome(task: Task, rank: int, timed_out: bool) -> Outcome:
    result = task.folder / f"{rank}.result"
    log = (task.folder / f"{rank}.log").read_text(errors="replace")
    if result.exists():
        value, error, trace = pickle.loads(result.read_bytes())
        return Outcome(rank, value, error, trace, log)
    error = TimeoutError("killed") if timed_out else RuntimeError("the process died")
    return Outcome(rank, None, error, "", log, timed_out)


def _rank(task: Task, rank: int, port: int) -> None:
    os.setpgid(0, 0)  # so that its children can be killed with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = open(task.folder / f"{rank}.log", "w", buffering=1)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    _set_environment(rank, task.world_size, port)
    result = _result(task, rank)
    partial = task.folder / f"{rank}.partial"
    partial.write_bytes(result)
    partial.rename(task.folder / f"{rank}.result")
    log.flush()


def _result(task: Task, rank: int) -> bytes:
    """(value, error, traceback), pickled; what cannot be pickled is an error itself."""
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{task.folder}/store",
            rank=rank,
            world_size=task.world_size,
            timeout=datetime.timedelta(seconds=task.timeout),
        )
        torch.set_num_threads(1)
        function, args = pickle.loads(task.call)
        return pickle.dumps((function(*args), None, ""))
    except Exception as e:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(e))
        except Exception:
            e = RuntimeError(f"{type(e).__name__}: {e}")
        return pickle.dumps((None, e, trace))


def _set_environment(rank: int, world_size: int, port: int) -> None:
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in values.items()})


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
