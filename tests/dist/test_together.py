"""What one rank raises, every rank raises: the rule by which no rank waits for another."""

import errno
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_quant.dist import Groups, raise_together, together
from megatron_quant.errors import CheckpointError, ExportError, FormatError, QuantError
from tests.dist.pool import Ranks

KINDS = (CheckpointError, ExportError, FormatError)


def _work(failing: tuple[int, ...]) -> int:
    rank = dist.get_rank()
    if rank in failing:
        raise KINDS[rank % len(KINDS)](f"rank {rank} has a reason")
    return rank * 10


def _together(failing: tuple[int, ...]) -> int:
    return together(Groups(), lambda: _work(failing))


def _again(failing: tuple[int, ...]) -> tuple[str, int]:
    """A failure leaves the ranks in step: the next phase works."""
    try:
        _together(failing)
    except QuantError as e:
        said = str(e)
    return said, _together(())


def _missing_file(reader: int) -> None:
    path = Path("/no/such/file" if dist.get_rank() == reader else "/dev/null")
    together(Groups(), path.read_bytes)


def _raise_on(rank: int) -> None:
    mine = FormatError("bad") if dist.get_rank() == rank else None
    raise_together(mine, Groups())


def test_without_an_error_each_rank_has_its_result(ranks: Ranks) -> None:
    assert ranks(4, _together, ()) == [0, 10, 20, 30]


@pytest.mark.parametrize("failing", [(0,), (3,), (1, 3), (3, 2, 1, 0)])
def test_the_lowest_rank_s_error_is_everyone_s(failing: tuple[int, ...], ranks: Ranks) -> None:
    errors = ranks.errors(4, _together, failing)
    first = min(failing)
    assert {type(e) for e in errors} == {KINDS[first % len(KINDS)]}
    assert [str(e) for e in errors] == [f"rank {first} has a reason"] * 4


def test_ranks_stay_in_step_after_it(ranks: Ranks) -> None:
    said = "rank 1 has a reason"
    assert ranks(4, _again, (1, 2)) == [(said, 0), (said, 10), (said, 20), (said, 30)]


def test_an_error_of_the_system_becomes_one_line(ranks: Ranks) -> None:
    errors = ranks.errors(2, _missing_file, 1)
    assert [str(e) for e in errors] == ["No such file or directory: /no/such/file"] * 2
    assert {type(e) for e in errors} == {QuantError}


def test_errors_that_were_caught_before(ranks: Ranks) -> None:
    assert ranks(2, _raise_on, 5) == [None, None]
    assert [str(e) for e in ranks.errors(2, _raise_on, 1)] == ["bad", "bad"]


def test_one_process_needs_no_group() -> None:
    assert together(Groups(), lambda: 5) == 5
    with pytest.raises(ExportError, match="alone"):
        raise_together(ExportError("alone"), Groups())

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out")

    with pytest.raises(QuantError, match="No space left on device: out"):
        together(Groups(), full)
