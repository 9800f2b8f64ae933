"""A Megatron checkpoint's folder: files that are replaced and removed, and files that never are."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_quant.dist import Groups
from megatron_quant.errors import ExportError
from megatron_quant.mcore.checkpoint import folder
from megatron_quant.mcore.checkpoint.folder import WRITTEN, Content, read_written, write_folder
from tests.dist.command import tree

MEGATRONS = ("__0_0.distcp", "__0_1.distcp", ".metadata", "common.pt", "metadata.json")
WHOLE = {*MEGATRONS, "hf", "hf/config.json", WRITTEN}


def content(text: str = "new") -> Content:
    """As Megatron writes it for one rank, and a file of ours in a folder."""

    def save(place: Path) -> None:
        assert not [*place.iterdir()]  # Megatron warns of a folder that is not empty
        for name in MEGATRONS:
            (place / name).write_text(text)

    def finish(place: Path) -> None:
        (place / "hf").mkdir()
        (place / "hf" / "config.json").write_text(text)

    return Content(
        place="--megatron-save-path",
        save=save,
        finish=finish,
        names=("hf/config.json",),
        made_of={"recipe": text},
    )


def saved(path: Path, text: str = "new") -> None:
    write_folder(path, Groups(), content(text))


def test_the_folder_lists_its_files(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    written = read_written(tmp_path / "a")
    assert written is not None and written.made_of == {"recipe": "new"}
    assert sorted(written.files) == sorted([*MEGATRONS, "hf/config.json"])
    assert set(tree(tmp_path / "a")) == WHOLE


def test_one_of_this_library_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path / "a", "old")
    saved(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "hf" / "config.json").read_text() == "new"


def test_a_users_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    saved(tmp_path / "a")
    assert set(tree(tmp_path / "a")) == WHOLE


def unlisted(path: Path) -> None:
    (path / WRITTEN).unlink()


def others_file(path: Path) -> None:
    (path / "hf" / "adapter.safetensors").write_text("mine")


def a_link(path: Path) -> None:
    shutil.rmtree(path / "hf")
    (path.parent / "mine").mkdir()
    (path.parent / "mine" / "config.json").write_text("mine")
    (path / "hf").symlink_to(path.parent / "mine")


def leads_out(path: Path) -> None:
    (path / WRITTEN).write_text(json.dumps({"files": ["../mine"], "made_of": {}}))


@pytest.mark.parametrize("spoil", [unlisted, others_file, a_link, leads_out])
@pytest.mark.parametrize("name", ["a", "a.incomplete", "a.replaced"])
def test_files_of_others_are_never_removed(spoil: Any, name: str, tmp_path: Path) -> None:
    saved(tmp_path / name, "old")
    spoil(tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(ExportError, match="choose another directory"):
        saved(tmp_path / "a")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("at", ["save", "finish"])
def test_a_failure_leaves_the_old_one_alone(at: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", "old")
    before, made = tree(tmp_path), content()

    def fail(place: Path) -> None:
        made.save(place) if at == "save" else made.finish(place)
        raise OSError(28, "No space left on device")

    parts = {"save": made.save, "finish": made.finish, at: fail}
    with pytest.raises((ExportError, OSError), match="No space left") as raised:
        write_folder(tmp_path / "a", Groups(), replace(made, **parts))
    if at == "finish":
        assert str(raised.value).endswith("choose another --megatron-save-path")
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir")


def killed_at(number: int, path: Path) -> bool:
    """Save in a child that ends, without a word, at its ``number``-th change of a name."""
    child = os.fork()
    if not child:
        left = number

        def counted(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            saved(path)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_every_step_loses_neither(tmp_path: Path) -> None:
    number, killed = 0, True
    while killed:
        place = tmp_path / str(number)
        saved(place / "a", "old")
        killed = killed_at(number, place / "a")
        whole = [
            p
            for p in (place / "a", place / "a.replaced", folder._work(place / "a") / "checkpoint")
            if set(tree(p)) == WHOLE
        ]
        assert whole, f"after {number} calls"
        saved(place / "a", "newer")
        assert [path.name for path in place.iterdir()] == ["a"], f"after {number} calls"
        assert (place / "a" / "hf" / "config.json").read_text() == "newer"
        number += 1
    assert number > 20


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    """The lock is of processes: another one holds it."""

    def meanwhile(place: Path) -> None:
        child = os.fork()
        if not child:
            try:
                saved(tmp_path / "a")
            except ExportError as error:
                expected = "is being written by another run", "choose another --megatron-save-path"
                os._exit(7 if all(words in str(error) for words in expected) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        made.save(place)

    made = content()
    write_folder(tmp_path / "a", Groups(), replace(made, save=meanwhile))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
