"""Every call of an export to the disk that can fail, failing below Python."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist import checkpoints
from tests.unit.errno_calls import CALLS

SHIM = Path(__file__).with_name("errno_shim.c")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one process for all runs."""
    folder = tmp_path_factory.mktemp("errno")
    source = checkpoints.save("qwen3", folder / "source", num_hidden_layers=1)
    library = folder / "shim.so"
    compiler = os.environ.get("CC", "cc")
    flags = ["-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Werror"]
    subprocess.run([*compiler.split(), *flags, "-o", library, SHIM, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.errno_runs", source, folder],
        env={**os.environ, "LD_PRELOAD": str(library)},
        cwd=SHIM.parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return content


@pytest.mark.parametrize("of", ["small", "streamed"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_leaves_nothing_that_looks_whole(
    call: str, of: str, found: dict[str, Any]
) -> None:
    count = found["counts"][of][call]
    runs = [run for run in found["runs"] if (run["of"], run["call"]) == (of, call)]
    assert call == "openat" or count >= 3
    assert len(runs) == (count if of == "small" else min(count, 5))
    for run in runs:
        assert run["resumed"], run
        if run["told"]:
            assert os.strerror(CALLS[call]) in run["told"] and "\n" not in run["told"], run
            assert all(name.endswith(".partial") for name in run["left"] or ()), run
            assert run["resume"] or run["left"] is None, run
        else:
            assert run["whole"], run


@pytest.mark.parametrize("call", ["rename", "fsync", "pwrite", "ftruncate", "fallocate"])
def test_no_such_call_may_fail_unseen(call: str, found: dict[str, Any]) -> None:
    assert all(run["told"] for run in found["runs"] if run["call"] == call)


def test_without_fsync_nothing_is_synced(found: dict[str, Any]) -> None:
    assert found["counts"]["unsynced"] == {"fsync": 0}


SAVES = ("open", "rename", "fsync", "write", "ftruncate")
"""The calls that a save to ``--megatron-save-path`` makes."""


@pytest.mark.parametrize("older", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("call", SAVES)
def test_a_save_that_fails_leaves_nothing_or_the_older_one(
    call: str, older: bool, found: dict[str, Any]
) -> None:
    runs = [run for run in found["saves"] if (run["older"], run["call"]) == (older, call)]
    told = [run for run in runs if run["told"]]
    assert len(told) >= (1 if call == "ftruncate" else 3), runs
    for run in runs:
        assert run["again"] == "new", run
        assert not run["told"] or not run["left_again"], run
        if not run["told"]:  # it was done but for removing what it had beside
            assert run["looks"] == "new", run
            assert run["left"] in ([], ["saved.incomplete"]), run
        elif older:
            assert run["looks"] in ("old", "new"), run
        else:
            assert not run["looks"] and not run["left"], run
        assert "\n" not in run["told"] and "--export-dir" not in run["told"], run
    assert any(
        os.strerror(CALLS[call]) in run["told"] and "--megatron-save-path" in run["told"]
        for run in runs
    )


def test_a_save_makes_no_other_calls(found: dict[str, Any]) -> None:
    """They would be told, or seen in the counts of ``SAVES``."""
    others = [run for run in found["saves"] if run["call"] not in SAVES]
    assert not [run for run in others if run["told"]]
