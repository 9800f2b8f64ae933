"""megatron_quant.dist in a process without a process group."""

import errno

import pytest
import torch
import torch.distributed

from megatron_quant.dist import Groups, gather, max_reduce, raise_together, sum_reduce, together
from megatron_quant.errors import CalibrationError, QuantError

ALONE = Groups()


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    assert not torch.distributed.is_initialized()


def test_groups_are_one_rank() -> None:
    assert (ALONE.rank, ALONE.size) == (0, 1)


def test_a_reduction_returns_what_it_is_given() -> None:
    values = torch.tensor([3.0, -1.0, torch.inf])
    assert torch.equal(max_reduce(values, ALONE), values)
    assert torch.equal(sum_reduce(torch.tensor([2, 5]), ALONE), torch.tensor([2, 5]))


def test_gather_is_a_list_of_one() -> None:
    assert gather({"a": 1}, ALONE) == [{"a": 1}]


def test_raise_together_raises_the_error_itself() -> None:
    raise_together(None, ALONE)
    error = CalibrationError("no token")
    with pytest.raises(CalibrationError) as caught:
        raise_together(error, ALONE)
    assert caught.value is error


def test_together_returns_what_the_work_returns() -> None:
    assert together(ALONE, lambda: 42) == 42


def failing(error: Exception) -> None:
    raise error


def test_together_keeps_the_kind_of_error() -> None:
    with pytest.raises(CalibrationError, match="no token"):
        together(ALONE, lambda: failing(CalibrationError("no token")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "No space left on device: /x/y"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("the disk is gone"), "the disk is gone"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), "No such file: a.json"),
    ],
)
def test_an_os_error_becomes_one_line(error: OSError, message: str) -> None:
    with pytest.raises(QuantError) as caught:
        together(ALONE, lambda: failing(error))
    assert str(caught.value) == message


def test_a_bug_is_not_disguised() -> None:
    with pytest.raises(ZeroDivisionError):
        together(ALONE, lambda: 1 // 0)
