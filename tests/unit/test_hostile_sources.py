"""Malicious checkpoints: one line each, little memory, nothing run or written elsewhere."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
import torch

from megatron_quant.ckpt.dialects.expressions import Effort
from megatron_quant.cli.console import escape
from megatron_quant.errors import CheckpointError
from megatron_quant.evaluation.tokenizer import load_tokenizer
from tests.dist.command import command, tree
from tests.unit import exported

INDEX, FIRST = exported.INDEX, "model-00001-of-00002.safetensors"
CONTROL = "\x1b]0;x\x07\x1b[2J\u202e"


class Runs:
    """A pickle that makes a file."""

    def __reduce__(self) -> object:
        return os.system, ("touch executed",)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda source: exported.edit_json(source / "config.json", lambda c: c.update(changes))


def content(name: str, text: str) -> Callable[[Path], None]:
    return lambda source: (source / name).write_text(text) and None


def fifo(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / name).unlink()
        os.mkfifo(source / name)

    return change


def endless(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / name).unlink()
        (source / name).symlink_to("/dev/zero")

    return change


def large(name: str) -> Callable[[Path], None]:
    return lambda source: os.truncate(source / name, 300_000_000)


def pickled(source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))


def named(source: Path) -> None:
    exported.edit(source, lambda tensors: tensors.update({f"{CONTROL}.a": torch.ones(2, 2)}))


def empty(source: Path) -> None:
    exported.write(source, {"a": torch.ones(1)}, exported.CONFIG)
    exported.edit(source, lambda tensors: tensors.clear())
    (source / INDEX).unlink()
    (source / FIRST).rename(source / "model.safetensors")
    (source / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def header(source: Path) -> None:
    path = source / FIRST
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def expression(source: Path) -> None:
    shutil.rmtree(source)
    exported.export(source, "gptq", exported.plan("int4"), exported.source_weights())
    dynamic = {"-:((\\w|\\w\\w|[.])+)+x$": {}}
    file = source / "config.json"
    exported.edit_json(file, lambda c: c["quantization_config"].update(dynamic=dynamic))


SOURCES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a thousand million layers": (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "a million layers": (config(num_hidden_layers=10**6), "num_hidden_layers=1000000 "),
    "a million experts": (config(num_experts=10**6), "num_experts=1000000 "),
    "layers for speculation": (config(num_nextn_predict_layers=10**9), "num_nextn_predict_layers="),
    "true layers": (config(num_hidden_layers=True), "num_hidden_layers=True"),
    "a deep config": (content("config.json", "[" * 10**6), "nested deeper than 64"),
    "a config of a list": (content("config.json", "[1]"), "holds no JSON object"),
    "a large config": (large("config.json"), "has 300000000 bytes"),
    "a pipe for a config": (fifo("config.json"), "is no regular file"),
    "a config without end": (endless("config.json"), "is no regular file"),
    "a large index": (large(INDEX), "has 300000000 bytes"),
    "a pipe for an index": (fifo(INDEX), "is no regular file"),
    "a pipe for weights": (fifo(FIRST), f"{FIRST}"),
    "weights without end": (endless(FIRST), f"{FIRST}"),
    "a header without end": (header, "truncated or no safetensors file"),
    "no tensor": (empty, "has 0 tensors"),
    "pickles": (pickled, "which can run code"),
    "an expression": (expression, "takes longer than 0.2 s"),
    "a name for the screen": (config(architectures=[CONTROL]), "\\x1b]0;x"),
    "a tensor for the screen": (named, "\\x1b]0;x"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported.write(tmp_path_factory.mktemp("plain") / "it", exported.source_weights())


def argv(source: Path, out: Path, *more: str) -> list[str]:
    flags = ["--weight-only", "--stream", "--export-quant-cfg", "nvfp4"]
    return ["quantize", "--hf-model-id", str(source), "--export-dir", str(out), *flags, *more]


@pytest.mark.parametrize("kind", SOURCES)
def test_it_ends_with_one_line(
    kind: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Effort.__init__, "__defaults__", (0.2,))
    monkeypatch.chdir(tmp_path)
    change, said = SOURCES[kind]
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    change(source)
    before, memory = sorted(tmp_path.rglob("*")), getrusage(RUSAGE_SELF).ru_maxrss
    flags = argv(source, tmp_path / "out")
    if kind == "a name for the screen":  # which --stream does not ask for
        flags.remove("--stream")
    ended = command(*flags)
    assert ended.status == 1 and said in ended.err, ended
    assert ended.err.startswith("megatron-quant: error: ") and ended.err.count("\n") == 1
    assert len(ended.err) < 2000 and ended.err.rstrip("\n").isprintable()
    assert sorted(tmp_path.rglob("*")) == before
    assert getrusage(RUSAGE_SELF).ru_maxrss - memory < 800_000  # KB


def test_code_beside_the_weights_is_not_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    config(auto_map={"AutoConfig": "code.C", "AutoTokenizer": ["code.T", None]})(source)
    (source / "code.py").write_text("open('executed', 'w')")
    before = tree(source)
    assert command(*argv(source, tmp_path / "out")).status == 0
    assert tree(source) == before and not list(tmp_path.rglob("executed"))
    assert (tmp_path / "out" / "code.py").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer.model"])
def test_a_tokenizer_of_any_size_is_not_parsed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 200_000_000)
    with pytest.raises(CheckpointError, match=f"{name} has 200000000 bytes"):
        load_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        load_tokenizer(tmp_path)


def test_recipes_are_regular_files(plain: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "it.yaml")
    ended = command(*argv(plain, tmp_path / "out", "--export-quant-cfg", str(tmp_path / "it.yaml")))
    assert ended.status == 1 and "is no regular file" in ended.err and ended.err.count("\n") == 1


def test_tables_print_no_control_characters() -> None:
    assert escape(f"[b]{CONTROL}") == "\\[b]\\x1b]0;x\\x07\\x1b[2J\\u202e"
