"""Errors of a disk name the file, the reason, and the flag that chose the place."""

import errno
import os
from pathlib import Path

import pytest

from megatron_quant.ckpt.storage import explained, read_source
from megatron_quant.errors import CheckpointError, ExportError
from tests.dist.pool import Ranks

CODES = ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EROFS", "ENOTDIR", "EEXIST", "ENOENT", "EIO")
PLACES = ("--export-dir", "--megatron-save-path", "--save-calibration")


@pytest.mark.parametrize("code", CODES)
def test_the_way_out_names_the_place(code: str) -> None:
    number = getattr(errno, code)
    for place in PLACES:
        with pytest.raises(ExportError) as raised, explained(Path("/x"), "cannot be used", place):
            raise OSError(number, os.strerror(number))
        said = str(raised.value)
        assert said.startswith(f"/x: cannot be used: {os.strerror(number)}; ")
        named = {flag for flag in (*PLACES, "--max-shard-size") if flag in said}
        if code == "EFBIG":
            assert named == ({"--max-shard-size"} if place == "--export-dir" else set())
        else:
            assert named == {place} and f"another {place}" in said


def name_latest(run: Path) -> None:
    from megatron_quant.mcore.training import train_state

    (run / f"{train_state.TRACKER}.incomplete").mkdir()
    train_state._name_latest(run / "iter_0000001", 1)


def test_the_place_of_a_training_run(ranks: Ranks, tmp_path: Path) -> None:
    (error,) = ranks.errors(1, name_latest, tmp_path)
    assert str(error).endswith("choose another directory for the run")


def test_a_file_of_the_source_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.json cannot be read: No such file") as raised:
        read_source(tmp_path / "a.json")
    assert "--export-dir" not in str(raised.value)
