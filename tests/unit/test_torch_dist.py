"""Opening Megatron's checkpoint directories, and refusing what their pickles may not do."""

import json
import os
import pickle
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint import pickles, place, torch_dist
from megatron_quant.mcore.checkpoint.torch_dist import open_torch_dist


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
    with pytest.raises(CheckpointError, match=r"latest_.*txt says '\.\./elsewhere', which names"):
        open_torch_dist(stored.parent)


def test_a_directory_that_is_none(stored: Path) -> None:
    (stored / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000012 holds no distributed checkpoint"):
        open_torch_dist(stored)


def test_another_format(stored: Path) -> None:
    (stored / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match=r"of format 'zarr': save it as torch_dist"):
        open_torch_dist(stored)


@pytest.mark.parametrize(
    ("folder", "given"),
    [
        ("release", "."),
        ("iter_0000012", "."),
        ("iter_0000012/weights", "iter_0000012"),
        ("model_weights", "."),
        ("run/iter_0000012/weights", "run"),
    ],
)
def test_where_a_checkpoint_is(folder: str, given: str, stored: Path) -> None:
    """Without a run's own word; iterations that are not complete do not count."""
    top = stored.parent / "top"
    (top / folder).parent.mkdir(parents=True)
    stored.rename(top / folder)
    (top / given / "iter_0000003").mkdir()
    (top / given / "iter_0000099").mkdir()
    assert open_torch_dist(top / given).path == top / folder


def test_the_legacy_format(tmp_path: Path) -> None:
    (tmp_path / "iter_0000012" / "mp_rank_00_000").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "iter_0000012"):
        (tmp_path / place.TRACKER).write_text("12")
        with pytest.raises(
            CheckpointError, match=r"iter_0000012 is a .* format torch .*--ckpt-conv"
        ):
            open_torch_dist(path)


def test_keys_that_are_left_out(stored: Path) -> None:
    opened = open_torch_dist(stored)
    assert opened.without(["decoder.*"]).shapes == {"b": ()}
    with pytest.raises(
        CheckpointError, match=r"--skip-keys mtp.\* matches no key of .*iter_0000012"
    ):
        opened.without(["mtp.*"])


class Bad:
    """A pickle that runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_does_something(stored: Path, tmp_path: Path) -> None:
    (stored / ".metadata").write_bytes(pickle.dumps(Bad(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=r"\.metadata holds more than a description .*system"):
        open_torch_dist(stored)
    assert not (tmp_path / "mark").exists()


def nested(levels: int, end: bytes) -> bytes:
    """A tuple of a tuple twice, of a tuple twice...: 2^levels to whoever hashes or shows it."""
    twice = b"".join(b"2\x86" for _ in range(levels))  # DUP, TUPLE2
    return b"\x80\x04}K\x01" + twice + end


BOMBS = {
    "hashed": nested(60, b"K\x01s."),
    "many levels": b"\x80\x04}K\x01" + b"\x85" * 3_000_000 + b"K\x01s.",
    "a place of the memo": b"\x80\x04K\x01r\xff\xff\xff\x7f.",
    "a length": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
    "an index": b"\x80\x04j\xff\xff\xff\x7f.",
    "a number": b"\x80\x04\x8b\xff\xff\xff\x7fx.",
    "random": bytes(range(256)) * 1000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_that_nobody_could_load(
    kind: str, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "_CPU", (1, 0))
    (stored / ".metadata").write_bytes(BOMBS[kind])
    before = getrusage(RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"\.metadata holds more than a desc") as caught:
        open_torch_dist(stored)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


@pytest.mark.parametrize(
    "tensors",
    [
        {1: torch.empty(1)},
        {"a": SimpleNamespace(size=3)},
        {"a": SimpleNamespace(size=(-1,))},
        {"a": SimpleNamespace(size=(True,))},
        {"a": SimpleNamespace(size=((1, 2), 3))},
    ],
)
def test_names_and_shapes_that_are_none(
    tensors: object, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(load=lambda: SimpleNamespace(state_dict_metadata=tensors))
    monkeypatch.setattr(torch_dist, "_Reader", lambda stream: found)
    with pytest.raises(CheckpointError, match=r"a tensor is called|a shape is no list"):
        open_torch_dist(stored)


def test_files_that_are_no_regular_ones(stored: Path) -> None:
    (stored.parent / place.TRACKER).write_text("1" * 5000)
    with pytest.raises(CheckpointError, match="has 5000 bytes, more than the 64"):
        open_torch_dist(stored.parent)
    (stored / ".metadata").unlink()
    os.mkfifo(stored / ".metadata")
    with pytest.raises(CheckpointError, match="holds no distributed checkpoint"):
        open_torch_dist(stored)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1})])
def test_what_describes_nothing(content: bytes, stored: Path) -> None:
    (stored / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata holds more than a description"):
        open_torch_dist(stored)
