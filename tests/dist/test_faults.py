"""Whatever one rank raises, every rank leaves at the same place and says which rank it was."""

import pytest
import torch.distributed as dist

from megatron_quant.dist import Groups, together
from megatron_quant.errors import CheckpointError, RankError
from tests.dist.pool import Ranks


class Unpicklable(Exception):
    """Holds what no pickle takes."""

    def __init__(self) -> None:
        super().__init__("holds a lambda")
        self.held = lambda: None


def made(name: str) -> Exception:
    return {
        "RuntimeError": RuntimeError("CUDA error: an illegal memory access was encountered"),
        "KeyError": KeyError("vocab_size"),
        "AssertionError": AssertionError("ours"),
        "Unpicklable": Unpicklable(),
    }[name]


def fails(name: str, victim: int) -> None:
    def work() -> None:
        if dist.get_rank() == victim:
            raise made(name)

    together(Groups(), work)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("name", ["RuntimeError", "KeyError", "AssertionError", "Unpicklable"])
def test_others_are_told_of_a_rank_that_fails(name: str, victim: int, ranks: Ranks) -> None:
    errors = ranks.errors(3, fails, name, victim)
    for rank, error in enumerate(errors):
        assert error is not None
        if rank != victim:
            assert isinstance(error, RankError)
            assert f"rank {victim} failed: {name}" in str(error) and "\n" not in str(error)
    assert not isinstance(errors[victim], RankError)


def refuses(victim: int) -> None:
    def work() -> None:
        if dist.get_rank() == victim:
            raise CheckpointError("config.json has no 'vocab_size'")

    together(Groups(), work)


def test_an_error_of_the_user_is_one_line_on_every_rank(ranks: Ranks) -> None:
    for error in ranks.errors(3, refuses, 1):
        assert isinstance(error, CheckpointError)
        assert str(error) == "config.json has no 'vocab_size'"
