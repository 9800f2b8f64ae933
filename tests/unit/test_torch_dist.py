"""Opening Megatron's checkpoint directories: what is one, and what no pickle in it may do."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_quant.ckpt.torch_dist import open_torch_dist
from megatron_quant.errors import CheckpointError


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    tensors = {"decoder.a": torch.ones(3, 2), "b": torch.ones((), dtype=torch.bfloat16)}
    path = tmp_path / "iter_0000012"
    save(tensors | {"text": "object"}, storage_writer=FileSystemWriter(path), no_dist=True)
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return path


def test_shapes_of_the_tensors(stored: Path) -> None:
    assert open_torch_dist(stored).shapes == {"decoder.a": (3, 2), "b": ()}


@pytest.mark.parametrize(("written", "folder"), [("12\n", "iter_0000012"), ("release", "release")])
def test_the_last_iteration_of_a_run(written: str, folder: str, stored: Path) -> None:
    stored = stored.rename(stored.parent / folder)
    (stored.parent / "latest_checkpointed_iteration.txt").write_text(written)
    assert open_torch_dist(stored.parent).path == stored


def test_an_iteration_that_is_none(stored: Path) -> None:
    (stored.parent / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"latest_.*txt says '\.\./elsewhere': give the"):
        open_torch_dist(stored.parent)


@pytest.mark.parametrize("name", ["metadata.json", ".metadata"])
def test_a_directory_that_is_none(name: str, stored: Path) -> None:
    (stored / name).unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000012 holds no distributed checkpoint"):
        open_torch_dist(stored)


def test_another_format(stored: Path) -> None:
    (stored / "metadata.json").write_text(json.dumps({"sharded_backend": "fsdp_dtensor"}))
    with pytest.raises(CheckpointError, match=r"of format 'fsdp_dtensor': save it as torch_dist"):
        open_torch_dist(stored)


class Bad:
    """A pickle that runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_does_something(stored: Path, tmp_path: Path) -> None:
    (stored / ".metadata").write_bytes(pickle.dumps(Bad(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=r"\.metadata does not only describe .*system"):
        open_torch_dist(stored)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1})])
def test_what_describes_nothing(content: bytes, stored: Path) -> None:
    (stored / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata does not only describe"):
        open_torch_dist(stored)
