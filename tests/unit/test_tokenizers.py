"""Tokenizers that are code, or lie elsewhere: what runs, and only when it is asked for."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_quant.errors import CheckpointError
from megatron_quant.evaluation import Text, TokenizerChoice, evaluate, load_tokenizer
from megatron_quant.runs import Calibration
from megatron_quant.runs.batches import calibration_batches
from tests.dist import checkpoints
from tests.dist.command import command

CODE = """
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    def __init__(self, **settings):
        super().__init__(**settings)

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {chr(i): i for i in range(256)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 256

    def _convert_id_to_token(self, index):
        return chr(index)
"""
TEXT = "abcdefgh" * 40
REFUSED = (
    "the tokenizer is Python code (tokenization_own.OwnTokenizer), which is not run unless asked "
    "for: read it and give --trust-remote-code, or name another tokenizer with --tokenizer"
)


def marking(name: str) -> str:
    """Code that leaves a file ``ran-NAME`` in the working directory."""
    return f"open('ran-{name}', 'w').close()\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3", tmp_path_factory.mktemp("plain"), num_hidden_layers=1)


@pytest.fixture
def coded(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``plain`` with a tokenizer that is code, and code for model and config."""
    cache = tmp_path / "modules"
    for module in ("transformers.dynamic_module_utils", "megatron_quant.evaluation.tokenizer"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(plain, tmp_path / "coded"))
    (model / "tokenizer.json").unlink()
    (model / "tokenization_own.py").write_text(marking("tokenizer") + CODE)
    (model / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
            }
        )
    )
    for kind in ("configuration", "modeling"):
        (model / f"{kind}_own.py").write_text(marking(kind))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text(TEXT)
    return model


def ran(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("ran-*"))


def test_code_is_refused_by_the_flags_name(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(coded)
    assert str(caught.value) == f"{coded}: {REFUSED}"
    ended = command("eval", str(coded), "--text", "text.txt", "--seq-length", "32")
    assert (ended.status, ended.err) == (1, f"megatron-quant: error: {coded}: {REFUSED}\n")
    assert ran(tmp_path) == []


def test_trusted_code_of_the_tokenizer_is_all_that_runs(coded: Path, tmp_path: Path) -> None:
    calibration = Calibration(
        dataset="text.txt", size=2, seq_length=8, batch_size=2, trust_remote_code=True
    )
    (batch,) = calibration_batches(calibration, coded, 10**6)
    assert batch.tolist() == [[ord(c) for c in "abcdefgh"]] * 2
    flags = ["--text", "text.txt", "--seq-length", "32", "--trust-remote-code"]
    ended = command("eval", str(coded), *flags)
    assert (ended.status, ended.err) == (0, "") and "perplexity" in ended.out
    assert ran(tmp_path) == ["ran-tokenizer"]


def test_quantize_takes_both_flags(coded: Path, plain: Path, tmp_path: Path) -> None:
    argv = ["quantize", "--stream", "--hf-model-id", str(coded), "--export-quant-cfg", "fp8"]
    argv += ["--export-dir", "out", "--calib-dataset", "text.txt", "--calib-size", "2"]
    argv += ["--calib-seq-length", "8"]
    ended = command(*argv)
    assert ended.status == 1 and f"{REFUSED}, or quantize with --weight-only" in ended.err
    assert command(*argv, "--tokenizer", str(plain)).status == 0 and ran(tmp_path) == []
    assert command(*argv, "--trust-remote-code", "--overwrite").status == 0
    assert ran(tmp_path) == ["ran-tokenizer"]


def test_a_tokenizer_from_elsewhere(coded: Path, plain: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    own = evaluate(plain, Text(text, 32), dtype=torch.float32)
    assert (
        evaluate(coded, Text(text, 32, tokenizer=TokenizerChoice(plain)), dtype=torch.float32)
        == own
    )
    with pytest.raises(CheckpointError, match="--tokenizer no/such is no directory: give the fol"):
        evaluate(plain, Text(text, 32, tokenizer=TokenizerChoice("no/such")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("absent", r"tokenization_own.py, the tokenizer's code, is missing: name a folder"),
        ("elsewhere", "the tokenizer's code is in another repository .them/it--tokenization_own"),
        ("failing", r"the tokenizer's code \(.*\) fails \(ZeroDivisionError: division by zero\): "),
    ],
)
def test_trusted_code_that_cannot_be_run(change: str, words: str, coded: Path) -> None:
    file, settings = coded / "tokenization_own.py", coded / "tokenizer_config.json"
    if change == "absent":
        file.unlink()
    elif change == "elsewhere":
        settings.write_text(
            settings.read_text().replace('"tokenization_own.', '"them/it--tokenization_own.')
        )
    else:
        file.write_text("1 / 0\n")
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(coded, trust_remote_code=True)
