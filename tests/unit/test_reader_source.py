"""Finding a checkpoint, and the files that an export takes along."""

from pathlib import Path

import huggingface_hub
import pytest

from megatron_quant.ckpt.storage.hub import resolve_source
from megatron_quant.errors import CheckpointError


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~") == tmp_path


@pytest.mark.parametrize("path", ["/no/where", "./model", "../a/b", "~/absent", "a/b/c", "model"])
def test_a_path_that_does_not_exist(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{path} does not exist; give a checkpoint dir"):
        resolve_source(path)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file; give the checkpoint's directory"):
        resolve_source(str(file))


@pytest.mark.parametrize("hub_id", ["nobody/nothing", "no body/nothing", "a--b/c"])
def test_a_hub_id_that_cannot_be_fetched(
    hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="is no local directory and cannot") as caught:
        resolve_source(hub_id)
    assert "\n" not in str(caught.value)
