"""Malicious checkpoints on two ranks: one line for both, and neither waits for the other."""

import shutil
from pathlib import Path

import pytest

from tests.dist.command import refused
from tests.dist.pool import Ranks
from tests.unit import exported
from tests.unit.test_hostile_sources import SOURCES, argv

KINDS = (
    "a million experts",
    "a pipe for a config",
    "weights without end",
    "a header without end",
    "pickles",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.write(tmp_path_factory.mktemp("plain") / "it", exported.source_weights())


@pytest.mark.parametrize("way", ["stream", "live"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ranks_end_with_one_line(
    kind: str, way: str, plain: Path, ranks: Ranks, tmp_path: Path
) -> None:
    change, said = SOURCES[kind]
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    change(source)
    flags = argv(source, tmp_path / "out")
    if way == "live":
        flags.remove("--stream")
    line = refused(ranks, tmp_path, flags)
    assert said in line and len(line) < 2000 and line.isprintable()
