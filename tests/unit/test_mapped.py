"""Files that are cut or grow while they are mapped."""

import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_quant.ckpt.read.directory import Checkpoint, open_directory
from megatron_quant.errors import CheckpointError
from megatron_quant.models import Box
from megatron_quant.native import library

ROWS = 4096


@pytest.fixture
def opened(tmp_path: Path) -> Checkpoint:
    """Of two tensors of 16 MB, of which the first was read."""
    tensors = {name: torch.ones(ROWS, 1024) for name in ("model.a", "model.b")}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = open_directory(tmp_path)
    assert read(found, "model.a").sum() == ROWS * 1024
    return found


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return checkpoint.read(name, Box((0, 0), (ROWS, 1024)))


def cut(file: Path) -> None:
    os.truncate(file, 20 << 20)


def lengthen(file: Path) -> None:
    os.truncate(file, 40 << 20)


@pytest.mark.parametrize("change", [cut, lengthen])
@pytest.mark.parametrize("name", ["model.a", "model.b"])
def test_another_size_is_seen_before_it_is_read(
    change: Callable[[Path], None], name: str, opened: Checkpoint, tmp_path: Path
) -> None:
    change(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: .*another program writes"):
        read(opened, name)


@pytest.mark.parametrize("left", [0, 1 << 20])
def test_a_file_that_is_cut_before_it_is_mapped(left: int, tmp_path: Path) -> None:
    save_file({"model.a": torch.ones(ROWS, 1024)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_directory(tmp_path)
    os.truncate(tmp_path / "model.safetensors", left)
    with pytest.raises(CheckpointError, match=r"model\.a cannot be read: .*another program writes"):
        read(checkpoint, "model.a")


def test_pages_that_go_while_they_are_read_get_a_last_word(
    opened: Checkpoint, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    child = os.fork()
    if not child:
        faulthandler.disable()  # pytest's, which has a word of its own
        library.explain_lost_pages.cache_clear()
        library.explain_lost_pages()
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        tensor = read(opened, "model.b")
        cut(tmp_path / "model.safetensors")
        tensor.numpy()[-1].sum()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
    assert "was cut short, or its disk failed, while it was read (SIGBUS)" in said.read_text()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no resident pages to read")
def test_pages_that_were_read_do_not_stay(tmp_path: Path) -> None:
    file, rows = tmp_path / "model.safetensors", ROWS // 4
    save_file({f"model.{i}": torch.ones(rows, 1024) for i in range(12)}, file)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_directory(tmp_path)
    for i in range(12):
        assert checkpoint.read(f"model.{i}", Box((0, 0), (rows, 1024))).sum() == rows * 1024
        assert resident(file) <= 24 << 20


def resident(file: Path) -> int:
    """Return the bytes of the file's pages that count as this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()
        if "-" in word[0]:
            ours = word[-1] == str(file)
        elif ours and word[0] == "Rss:":
            total += int(word[1]) * 1024
    return total
