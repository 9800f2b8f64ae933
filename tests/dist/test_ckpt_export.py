"""An export by real ranks gives one rank's files, and one rank's error reaches all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_quant.ckpt.plan.row_joins import joints
from megatron_quant.ckpt.write.rank_work import work_of
from megatron_quant.ckpt.plan.parts import RankPart
from megatron_quant.ckpt.write.encode_part import Produced
from megatron_quant.ckpt.storage.box_bytes import runs
from megatron_quant.ckpt.write.exporter import Destination, Existing, export
from megatron_quant.dist import Groups, Shards
from megatron_quant.errors import ExportError, FormatError, RankError
from tests.dist.pool import Ranks
from tests.unit import ckpt_world as world
from tests.unit.test_ckpt_writer import BESIDE, contents, producer


def joining(layout: str) -> Groups:
    """All ranks, who put the rows of what they share together."""
    world_size, tp, _, etp = world.LAYOUTS[layout]

    def among(size: int) -> Groups:
        found = [
            dist.new_group(list(range(first, first + size))) for first in range(0, world_size, size)
        ]
        return Groups(found[dist.get_rank() // size])

    return Groups(shards=Shards(among(tp), among(etp)))


def _export(layout: str, directory: Path) -> None:
    plan = world.plan("nvfp4", layout)
    export(plan, Groups(), producer(layout, dist.get_rank()), Destination(directory=directory, companions=BESIDE))


def _export_joining(recipe: str, layout: str, directory: Path) -> list[tuple[str, int]]:
    """What this rank wrote of joined tensors: name and runs of the file."""
    plan, rank = world.plan(recipe, layout), dist.get_rank()
    export(plan, joining(layout), producer(layout, rank), Destination(directory=directory, companions=BESIDE))
    work = work_of(plan, rank, joints(plan))
    filled = [f for joint in work.joined for f in work.filled(joint)]
    return [(entry.name, len(list(runs(entry, box)))) for entry, box in filled]


def _fail_on_rank_2(directory: Path) -> None:
    def failing(part: RankPart) -> Iterator[Produced]:
        if dist.get_rank() == 2:
            raise FormatError(f"{part.target.source.name} is bad")
        return producer("tp2-ep2", dist.get_rank())(part)

    plan = world.plan("nvfp4", "tp2-ep2")
    export(plan, Groups(), failing, Destination(directory=directory, companions=BESIDE))


def test_ranks_write_what_one_rank_writes(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1, _export, "tp1", tmp_path / "one")
    ranks(4, _export, "tp2-etp2", tmp_path / "four")
    assert contents(tmp_path / "four") == contents(tmp_path / "one")


@pytest.mark.parametrize("recipe", ["nvfp4", "fp8"])
def test_rows_that_are_put_together_are_written_at_once(
    recipe: str, ranks: Ranks, tmp_path: Path
) -> None:
    ranks(1, _export_joining, recipe, "tp1", tmp_path / "one")
    found = ranks(4, _export_joining, recipe, "tp2-etp2", tmp_path / "four")
    assert contents(tmp_path / "four") == contents(tmp_path / "one")
    assert all(count == 1 for of_rank in found for _, count in of_rank)
    names = {name for of_rank in found for name, _ in of_rank}
    assert {n.split(".")[-2] for n in names} == {"o_proj", "down_proj"}


def _fail_in(kind: type[Exception], what: str, rank: int, directory: Path) -> None:
    """Encode until ``rank`` fails at a tensor of this name."""
    me = dist.get_rank()

    def failing(part: RankPart) -> Iterator[Produced]:
        if me == rank and what in part.target.source.name:
            raise kind(f"{part.target.source.name} is bad")
        return producer("tp2-etp2", me)(part)

    plan = world.plan("nvfp4", "tp2-etp2")
    export(plan, joining("tp2-etp2"), failing, Destination(directory=directory, companions=BESIDE))


@pytest.mark.parametrize("kind", [FormatError, RuntimeError, MemoryError])
@pytest.mark.parametrize(
    ("what", "rank"), [("0.self_attn.o_proj", 1), ("down_proj", 2), ("norm", 0)]
)
def test_nobody_waits_for_a_rank_that_failed(
    what: str, rank: int, kind: type[Exception], ranks: Ranks, tmp_path: Path
) -> None:
    errors = ranks.errors(4, _fail_in, kind, what, rank, tmp_path, timeout=60)
    others = FormatError if kind is FormatError else RankError
    assert [type(e) for e in errors] == [kind if r == rank else others for r in range(4)]
    assert {what in str(error) for error in errors} == {True}
    if others is RankError:
        assert {f"rank {rank} failed" in str(e) for r, e in enumerate(errors) if r != rank} == {
            True
        }
    assert contents(tmp_path) == {}


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
