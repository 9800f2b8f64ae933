"""An export by real ranks: the files of one rank, and one rank's error on all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_quant.ckpt.plan import Part
from megatron_quant.ckpt.produce import Produced
from megatron_quant.ckpt.writer import Existing, export
from megatron_quant.dist import Groups
from megatron_quant.errors import ExportError, FormatError
from tests.dist.pool import Ranks
from tests.unit import ckpt_world as world
from tests.unit.test_ckpt_writer import BESIDE, contents, producer


def _export(layout: str, directory: Path) -> None:
    plan = world.plan("nvfp4", layout)
    export(plan, Groups(), producer(layout, dist.get_rank()), directory, BESIDE)


def _fail_on_rank_2(directory: Path) -> None:
    def failing(part: Part) -> Iterator[Produced]:
        if dist.get_rank() == 2:
            raise FormatError(f"{part.target.source.name} is bad")
        return producer("tp2-ep2", dist.get_rank())(part)

    plan = world.plan("nvfp4", "tp2-ep2")
    export(plan, Groups(), failing, directory, BESIDE, Existing.REFUSE)


def test_ranks_write_what_one_rank_writes(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1, _export, "tp1", tmp_path / "one")
    ranks(4, _export, "tp2-etp2", tmp_path / "four")
    assert contents(tmp_path / "four") == contents(tmp_path / "one")


def test_an_error_of_one_rank_is_raised_on_all_and_leaves_nothing(
    ranks: Ranks, tmp_path: Path
) -> None:
    errors = ranks.errors(4, _fail_on_rank_2, tmp_path)
    assert [type(error) for error in errors] == [FormatError] * 4
    assert len({str(error) for error in errors}) == 1
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("layout", ["tp2", "tp2-ep2"])
def test_a_directory_that_is_not_empty_is_refused_on_all_ranks(
    ranks: Ranks, layout: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    errors = ranks.errors(world.LAYOUTS[layout][0], _export, layout, tmp_path)
    assert {type(error) for error in errors} == {ExportError}
    assert contents(tmp_path) == {"mine.txt": b"x"}
