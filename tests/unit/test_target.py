"""The directory of an export: what is removed, what is refused, and what a failing disk leaves."""

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_quant.ckpt.storage.disk import allocate, sync_directory
from megatron_quant.ckpt.write import unfinished
from megatron_quant.ckpt.write.directory import Existing
from megatron_quant.ckpt.write.exporter import Destination, export
from megatron_quant.ckpt.write.lock import Lock
from megatron_quant.ckpt.write.pipeline import WriteOptions
from megatron_quant.dist import Groups
from megatron_quant.errors import ExportError, VerifyError
from tests.unit import ckpt_world as world
from tests.unit.test_ckpt_writer import BESIDE, contents, producer

DOCUMENT = ".megatron_quant_unfinished.json.partial"


def write(
    out: Path,
    existing: Existing = Existing.REFUSE,
    check: Callable[[Path], object] | None = None,
    fsync: bool = True,
) -> None:
    plan = world.plan("nvfp4", "tp1", max_shard=20_000)
    options = WriteOptions(1, fsync)
    export(
        plan,
        Groups(),
        producer(),
        Destination(
            directory=out, companions=BESIDE, existing=existing, options=options, check=check
        ),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    write(out)
    return contents(out)


def test_overwrite_removes_what_it_wrote_alone(tmp_path: Path, whole: dict[str, bytes]) -> None:
    write(tmp_path)
    mine = {"lora.safetensors": b"mine", ".notes.partial": b"mine"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    write(tmp_path, Existing.REPLACE)
    assert contents(tmp_path) == {**whole, **mine}


def test_an_error_removes_what_it_wrote_alone(tmp_path: Path) -> None:
    def wrong(_: Path) -> None:
        (tmp_path / ".mine.partial").write_bytes(b"mine")
        raise VerifyError("wrong")

    with pytest.raises(VerifyError, match="wrong"):
        write(tmp_path, check=wrong)
    assert contents(tmp_path) == {".mine.partial": b"mine"}


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"config\.json is in the way, and no export of this"):
        write(tmp_path, Existing.REPLACE)
    assert contents(tmp_path) == {"config.json": b"mine"}


@pytest.mark.parametrize(
    ("out", "where"), [("a", "is the"), ("a/b", "lies in the"), (".", "lies around the")]
)
def test_a_source_is_not_replaced(out: str, where: str, tmp_path: Path) -> None:
    tokenizer = tmp_path / "a" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("{}")
    beside = replace(BESIDE, carried=(tokenizer,), root=tokenizer.parent)
    plan = world.plan("nvfp4", "tp1")
    with pytest.raises(ExportError, match=f"{where} source checkpoint"):
        export(
            plan,
            Groups(),
            producer(),
            Destination(directory=tmp_path / out, companions=beside, existing=Existing.REPLACE),
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "tokenizer.json"]


def test_verification_comes_before_names(tmp_path: Path, whole: dict[str, bytes]) -> None:
    def seen(preview: Path) -> None:
        assert contents(preview) == whole
        assert all(name.endswith(".partial") for name in contents(tmp_path))
        raise VerifyError("wrong")

    with pytest.raises(VerifyError):
        write(tmp_path, Existing.RESUME, seen)
    assert all(name.endswith(".partial") for name in contents(tmp_path))
    write(tmp_path, Existing.RESUME)
    assert contents(tmp_path) == whole


def test_one_run_at_a_time(tmp_path: Path, whole: dict[str, bytes]) -> None:
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        held = Lock(tmp_path)  # as long as this name lives
        os.write(writing, b"x")
        signal.pause()
        held.release()
    try:
        os.read(reading, 1)
        said = f"being written by another run .process {holder} on"
        with pytest.raises(ExportError, match=said):
            write(tmp_path)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    write(tmp_path)
    assert contents(tmp_path) == whole


def test_another_release_does_not_continue(tmp_path: Path) -> None:
    def wrong(_: Path) -> None:
        raise VerifyError("wrong")

    with pytest.raises(VerifyError):
        write(tmp_path, Existing.RESUME, wrong)
    document = (tmp_path / DOCUMENT).read_text()
    (tmp_path / DOCUMENT).write_text(document.replace("megatron_quant ", "megatron_quant older "))
    with pytest.raises(ExportError, match=r"encoders of another release \(megatron_quant older"):
        write(tmp_path, Existing.RESUME)


def test_a_directory_that_another_host_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SEEN_WITHIN", 0.02)
    with pytest.raises(ExportError, match="is not the directory that rank 0 writes: choose an"):
        unfinished.wait_for(tmp_path, "run")


def test_a_file_system_without_such_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", none)
    sync_directory(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", none)  # glibc's, which emulates
    with (tmp_path / "file").open("wb") as stream:
        allocate(stream.fileno(), 5000)
    assert (tmp_path / "file").stat().st_size == 5000
