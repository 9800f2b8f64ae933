"""``--distributed-timeout-minutes``: how long a rank waits for the slowest one."""

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_quant import rendezvous
from megatron_quant.dist import gather
from megatron_quant.errors import LostRankError
from tests.dist.command import Ended, command
from tests.dist.pool import Ranks

MINUTES = 0.02
SECONDS = 60 * MINUTES


def late(where: str) -> object:
    """Rank 1 comes too late; what rank 0 is told."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    if where == "start" and rank == 0:
        return command("verify", "/none", "--distributed-timeout-minutes", str(MINUTES))
    if where == "collective":
        groups = rendezvous.start_ranks(MINUTES)
        assert groups.minutes == MINUTES
        if rank == 0:
            return gather(rank, groups)
    time.sleep(3 * SECONDS)
    os._exit(0)


def test_a_rank_that_never_starts(ranks: Ranks) -> None:
    errors = ranks.errors(2, raised, "start", timeout=60)
    said = str(errors[0])
    assert said.startswith("[rank 0] megatron-quant: error: not all of the 2 ranks came to ")
    assert said.endswith("within 0.02 minutes: see what the others printed, or raise "
                         "--distributed-timeout-minutes\n")


def raised(where: str) -> None:
    ended = late(where)
    raise ValueError(ended.err if isinstance(ended, Ended) else ended)


def test_a_rank_that_is_late_for_a_collective(ranks: Ranks) -> None:
    first, second = ranks.errors(2, late, "collective", timeout=60)
    assert isinstance(first, LostRankError)
    assert str(first).startswith("the other ranks do not answer")
    assert "--distributed-timeout-minutes" in str(first)
    assert str(second) == "the process died"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_no_time_at_all_is_refused(minutes: str, tmp_path: Path) -> None:
    ended = command("verify", str(tmp_path), "--distributed-timeout-minutes", minutes)
    assert ended.status == 1
    assert f"--distributed-timeout-minutes is {float(minutes):g}: give more than 0" in ended.err
