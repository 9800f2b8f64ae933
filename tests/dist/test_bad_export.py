"""The ``export`` verb between a source and a target that fail: one line on all ranks, no index."""

from pathlib import Path

import pytest

from tests.dist import checkpoints
from tests.dist.command import command, copy, message, quantize_argv, refused, tree
from tests.dist.pool import Ranks
from tests.dist.test_bad_checkpoint import with_small_files


@pytest.fixture(scope="module")
def quantized(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("quantized") / "out"
    flags = {"tp": 1, "ep": 1, "max_shard_size": "500KB"}
    assert ranks(1, command, *quantize_argv(source, out, **flags))[0].status == 0
    return out


def export_argv(source: Path, out: Path | str, *flags: str) -> list[str]:
    chosen = ["--export-format", "compressed-tensors", "--export-dir", str(out)]
    return ["export", str(source), *chosen, *flags]


@pytest.mark.parametrize("damage", ["cut short", "a directory", "gone"])
def test_a_source_shard_that_cannot_be_read(
    damage: str, quantized: Path, ranks: Ranks, tmp_path: Path
) -> None:
    bad = copy(quantized, tmp_path / "bad")
    shard = sorted(bad.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if damage == "cut short":
        shard.write_bytes(content[:-100])
    elif damage == "a directory":
        shard.mkdir()
    assert str(shard) in refused(ranks, tmp_path, export_argv(bad, tmp_path / "out"))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/sys/out", "that you may write"),
        ("/dev/null/out", "choose another --export-dir, one that is a directory"),
    ],
)
def test_a_target_that_cannot_be_written(
    target: str, words: str, quantized: Path, ranks: Ranks, tmp_path: Path
) -> None:
    said = refused(ranks, tmp_path, export_argv(quantized, target))
    assert said.startswith(f"{target}: cannot be used: ") and words in said


def test_the_source_as_target(quantized: Path, ranks: Ranks) -> None:
    said = refused(ranks, quantized, export_argv(quantized, quantized, "--overwrite"))
    assert said == f"--export-dir {quantized} is the source checkpoint; choose another directory"


def test_flags_that_contradict_each_other(quantized: Path, ranks: Ranks, tmp_path: Path) -> None:
    argv = export_argv(quantized, tmp_path / "out", "--resume", "--overwrite")
    assert "give one of them" in refused(ranks, tmp_path, argv)
    argv = export_argv(quantized, tmp_path / "out", "--io-threads", "0")
    assert "--io-threads is 0: give at least 1" in refused(ranks, tmp_path, argv)


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_and_then_is_not(
    full: int, quantized: Path, ranks: Ranks, tmp_path: Path
) -> None:
    argv = export_argv(quantized, tmp_path / "out")
    small = 300_000  # bytes that the file of one rank can have
    doing = ("cannot take", "cannot be written")[full]
    assert doing in message(ranks(2, with_small_files, (full,), small, argv, timeout=60))
    assert tree(tmp_path) == {}
    argv.append("--resume")
    assert doing in message(ranks(2, with_small_files, (full,), small, argv, timeout=60))
    left = tree(tmp_path / "out")
    assert left and all(name.endswith(".partial") for name in left)
    assert [e.status for e in ranks(2, command, *argv)] == [0, 0]
    assert ranks(1, command, *export_argv(quantized, tmp_path / "again"))[0].status == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
