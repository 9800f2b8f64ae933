"""Ranks that were not started alike are told so, all in one line, before anything is written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

import megatron_quant.cli.main as cli
from tests.dist import checkpoints
from tests.dist.command import Ended, command, copy, message, quantize_argv, tree
from tests.dist.pool import Ranks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"))


def each_its_own(argvs: list[list[str]], alone: bool) -> Ended:
    """Every rank its own command line; ``alone``: without the process group of the test's pool."""
    rank = dist.get_rank()
    if alone:
        dist.barrier()  # another rank may still be connecting to this one
        dist.destroy_process_group()
    return command(*argvs[rank])


def ended_alike(ranks: Ranks, folder: Path, argvs: list[list[str]], alone: bool = True) -> str:
    before = tree(folder)
    said = message(ranks(len(argvs), each_its_own, argvs, alone, timeout=60))
    assert tree(folder) == before
    return said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"dry_run": True}, "--dry-run is False on ranks 0, 2, True on rank 1"),
        ({"export_quant_cfg": "fp8"}, "--export-quant-cfg is nvfp4 on ranks 0, 2, fp8 on rank 1"),
        ({"stream": True}, "--stream is False on ranks 0, 2, True on rank 1"),
        ({"tp": 1}, "--tp is 2 on ranks 0, 2, 1 on rank 1"),
        ({"export_dir": "/other"}, "/other on rank 1"),
    ],
)
def test_another_flag_on_one_rank(
    flags: dict[str, object], words: str, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    usual = quantize_argv(source, tmp_path / "out")
    other = quantize_argv(source, tmp_path / "out", **flags)
    said = ended_alike(ranks, tmp_path, [usual, other, usual])
    assert said.startswith("the ranks were not started alike: ") and words in said


def test_another_verb_on_one_rank(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    usual = quantize_argv(source, tmp_path / "out")
    said = ended_alike(ranks, tmp_path, [["verify", str(source)], usual])
    assert "the verb is verify on rank 0, quantize on rank 1" in said


def test_a_rank_whose_flags_are_refused(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    usual = quantize_argv(source, tmp_path / "out")
    ended = ranks(2, each_its_own, [usual, [*usual, "--no-such-flag"]], True, timeout=60)
    assert [e.status for e in ended] == [1, 2]
    words = "the command line is well on rank 0, none that runs on rank 1"
    assert words in ended[0].err and "unrecognized arguments: --no-such-flag" in ended[1].err
    assert tree(tmp_path) == {}


def of_another_release(argv: list[str]) -> Ended:
    if dist.get_rank() == 1:
        cli.__version__ = "0.0.9"
    return command(*argv)


def test_another_release_on_one_rank(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    argv = quantize_argv(source, tmp_path / "out")
    said = message(ranks(2, of_another_release, argv, timeout=60))
    assert "the version of megatron_quant is" in said and "0.0.9 on rank 1" in said
    assert tree(tmp_path) == {}


def on_its_own_host(folder: Path, argv: list[str]) -> Ended:
    """Relative paths find other files on each rank, as on several hosts."""
    os.chdir(folder / str(dist.get_rank()))
    os.environ["LOCAL_RANK"] = "0"
    return command(*argv)


def hosts(folder: Path, name: str, contents: list[Path | str]) -> Path:
    for rank, content in enumerate(contents):
        place = folder / str(rank) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copytree(content, place)
        else:
            place.write_text(content)
    return folder


@pytest.mark.parametrize("flags", [{}, {"stream": True, "tp": 1, "ep": 1}], ids=["live", "stream"])
def test_another_source_under_the_same_path(
    flags: dict[str, object], source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    other = copy(source, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    folder = hosts(tmp_path / "hosts", "model", [source, other])
    argv = quantize_argv(Path("model"), tmp_path / "out", **flags)
    said = message(ranks(2, on_its_own_host, folder, argv, timeout=60))
    assert said.startswith("the ranks would not do the same: the digest of the source is ")
    assert not (tmp_path / "out").exists()


def test_another_recipe_under_the_same_path(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    recipe = (Path(cli.__file__).parents[1] / "configs" / "int4.yaml").read_text()
    other = (Path(cli.__file__).parents[1] / "configs" / "fp8.yaml").read_text()
    folder = hosts(tmp_path / "hosts", "recipe.yaml", [recipe, other])
    argv = quantize_argv(source, tmp_path / "out", export_quant_cfg="recipe.yaml")
    argv[argv.index("--export-format") if "--export-format" in argv else len(argv) :] = []
    said = message(
        ranks(2, on_its_own_host, folder, [*argv, "--export-format", "compressed-tensors"])
    )
    assert "the digest of the recipe is " in said
    assert not (tmp_path / "out").exists()


def test_other_data_under_the_same_path(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    folder = hosts(tmp_path / "hosts", "data.txt", ["some words " * 40, "other words " * 40])
    few = {"calib_dataset": "data.txt", "calib_size": 2, "calib_seq_length": 4}
    argv = quantize_argv(source, tmp_path / "out", weight_only=None, **few)
    said = message(ranks(2, on_its_own_host, folder, argv, timeout=60))
    assert "the digest of the data is " in said
    assert not (tmp_path / "out").exists()
