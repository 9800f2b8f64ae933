"""Finding a checkpoint, and the files that an export takes along."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from megatron_quant.ckpt.storage.hub import resolve_source
from megatron_quant.dist import Groups
from megatron_quant.errors import CheckpointError
from megatron_quant.runs import agree
from megatron_quant.runs.options import QuantizeOptions


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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="is no local directory and cannot") as caught:
        resolve_source(hub_id)
    assert "\n" not in str(caught.value)


PUBLISHED = {
    "model-00001-of-00002.safetensors": True,
    "model.safetensors.index.json": True,
    "mtp.safetensors": True,
    "config.json": True,
    "tekken.json": True,
    "tokenizer.model.v3": True,
    "qwen.tiktoken": True,
    "merges.txt": True,
    "vocab.txt": True,
    "chat_template.jinja": True,
    "LICENSE": True,
    "README.md": True,
    "additional_chat_templates/tool_use.jinja": True,
    "1_Pooling/config.json": True,
    "consolidated.safetensors": False,
    "consolidated.safetensors.index.json": False,
    "modeling_kimi.py": False,
    "tokenization_kimi.py": False,
    "tokenizer.py": False,
    "tokenizer.sh": False,
    "tokenizer.pkl": False,
    "tokenizer_native.so": False,
    "vocab.bin": False,
    "LICENSE.py": False,
    "pytorch_model.bin": False,
    "1_Pooling/pooling.py": False,
    "additional_chat_templates/load.py": False,
    "original/model.safetensors": False,
    "original/config.json": False,
    "onnx/model.json": False,
    "figures/benchmark.png": False,
}
"""Files of repositories -> whether they are fetched."""


@pytest.mark.parametrize(("code", "weights"), [(False, True), (True, True), (False, False)])
def test_no_needless_folder_is_fetched_and_code_on_request_alone(
    code: bool, weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = tmp_path / "snapshots" / "0123abcd"
    fetched: list[str] = []
    revisions = []

    def snapshot_download(
        repo_id: str,
        *,
        allow_patterns: list[str],
        ignore_patterns: list[str] | None = None,
        revision: str | None = None,
    ) -> str:
        assert repo_id == "owner/name"
        revisions.append(revision)
        fetched.extend(
            filter_repo_objects(
                PUBLISHED, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert resolve_source("owner/name", code, weights) == commit
    python = {n for n in PUBLISHED if n.endswith(".py") and "/" not in n} if code else set()
    wanted = {name for name, is_wanted in PUBLISHED.items() if is_wanted}
    if not weights:
        wanted -= {name for name in wanted if name.endswith(".safetensors")}
    assert sorted(fetched) == sorted(wanted | python)
    assert revisions == [None, commit.name]  # all files are of one commit


@pytest.mark.parametrize(("trusted", "run"), [(False, None), (True, None), (False, Path("RUN"))])
def test_a_run_fetches_code_where_it_may_run_it_and_weights_where_it_reads_them(
    trusted: bool, run: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []

    def resolved(_: str, code: bool = False, weights: bool = True) -> Path:
        asked.append((code, weights))
        return tmp_path

    monkeypatch.setattr("megatron_quant.runs.agree.resolve_source", resolved)
    options = QuantizeOptions.from_flags(
        hf_model_id="owner/name",
        export_quant_cfg="fp8",
        trust_remote_code=trusted,
        megatron_load_path=run,
    )
    assert agree.fetched(options, Groups()).hf_model_id == str(tmp_path)
    assert asked == [(trusted, run is None)]
