"""The ``ranks`` fixture itself."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.pool import RankError, Ranks, RankTimeout


def _total(x: int) -> tuple[int, str]:
    total = torch.tensor([x + dist.get_rank()])
    dist.all_reduce(total)
    return int(total), os.environ["LOCAL_RANK"]


def _fail_on_rank_1() -> str:
    print("before it fails")
    if dist.get_rank() == 1:
        raise ValueError("one is wrong")
    return "fine"


def _exit_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def _hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def _state_left_behind() -> bool:
    before = "LEFT_BEHIND" in os.environ
    os.environ["LEFT_BEHIND"] = "1"
    return before


def test_every_rank_returns_its_value_in_rank_order(ranks: Ranks) -> None:
    assert ranks(4, _total, 10) == [(46, "0"), (46, "1"), (46, "2"), (46, "3")]


def test_tensors_come_back_by_value(ranks: Ranks) -> None:
    (got,) = ranks(1, torch.add, torch.ones(3), torch.ones(3))
    assert torch.equal(got, torch.full((3,), 2.0))


def test_ranks_start_clean(ranks: Ranks) -> None:
    assert ranks(1, _state_left_behind) == [False]
    assert ranks(1, _state_left_behind) == [False]


def test_an_exception_names_its_rank(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1: ValueError: one is wrong") as caught:
        ranks(2, _fail_on_rank_1)
    assert "before it fails" in str(caught.value)
    assert "_fail_on_rank_1" in str(caught.value)


def test_errors_are_returned_on_demand(ranks: Ranks) -> None:
    first, second = ranks.errors(2, _fail_on_rank_1)
    assert first is None
    assert isinstance(second, ValueError)


def test_a_dead_rank_is_an_error(ranks: Ranks) -> None:
    first, second = ranks.errors(2, _exit_on_rank_1)
    assert first is None
    assert "the process died" in str(second)


def test_a_late_rank_is_killed_and_shows_its_stack(ranks: Ranks) -> None:
    with pytest.raises(RankTimeout, match=r"ranks \[1\] did not end") as caught:
        ranks(2, _hang_on_rank_1, timeout=3.0)
    assert "_hang_on_rank_1" in str(caught.value)
