"""The example that trains a checkpoint, at a size that takes seconds."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "make_small_moe.py"
SMALL = [
    *("--steps=120", "--log-every=40", "--threads=1", "--batch-size=4", "--seq-length=32"),
    *("--vocab-size=512", "--hidden-size=32", "--layers=2", "--heads=2", "--kv-heads=1"),
    *("--head-dim=16", "--experts=4", "--moe-intermediate-size=32", "--lr=0.01"),
    *("--train-chars=80000", "--heldout-chars=4000", "--calibration-chars=4000"),
]


@pytest.fixture
def example(monkeypatch):
    """The script as a module; what it sets for the process is put back."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    spec = importlib.util.spec_from_file_location("make_small_moe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_it_writes_a_learned_checkpoint_and_the_same_one_again(example, tmp_path, capsys):
    for name in ("one", "two"):
        example.main(["--output-dir", str(tmp_path / name / "model"), *SMALL])
    printed = capsys.readouterr().out
    learned = [float(p) for p in re.findall(r"held-out perplexity ([\d.]+)", printed)]
    assert len(learned) == 2
    assert max(learned) < 512 / 2  # 512 is what a model that knows nothing has
    one, two = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert {t.dtype for t in one.values()} == {torch.bfloat16}
    check_directory(tmp_path / "one")
    check_reuse(example, tmp_path / "one", capsys)


def check_reuse(example, directory: Path, capsys) -> None:
    """It is kept while settings are the same, and made again after a run that did not end."""
    weights = directory / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    example.main(["--output-dir", str(directory / "model"), *SMALL])
    assert capsys.readouterr().out.startswith("kept ")
    example.main(["--output-dir", str(directory / "model"), *SMALL, "--steps=1"])
    assert weights.stat().st_mtime_ns > before
    assert "kept" not in capsys.readouterr().out
    (directory / "model.made_from").unlink()
    example.main(["--output-dir", str(directory / "model"), *SMALL, "--steps=1"])
    assert "kept" not in capsys.readouterr().out


def check_directory(directory: Path) -> None:
    config = AutoConfig.from_pretrained(directory / "model")
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == (
        "qwen3_moe",
        4,
        2,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    assert tokenizer.eos_token_id == config.eos_token_id == 0
    heldout = (directory / "heldout.txt").read_text(encoding="utf-8")
    calibration = (directory / "calibration.txt").read_text(encoding="utf-8")
    assert min(len(heldout), len(calibration)) >= 4000
    assert heldout[:2000] not in calibration
    ids = tokenizer(heldout, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == heldout
    assert max(ids) < config.vocab_size


def test_texts_are_disjoint_and_follow_the_seed(example):
    args = example.parse(["--output-dir", "out", *SMALL])
    texts = example.read_texts(args)
    assert example.read_texts(args) == texts
    files = {text for text in texts.train if len(text) > 200}
    assert not any(text in texts.heldout or text in texts.calibration for text in files)
    args.seed += 1
    assert example.read_texts(args).heldout != texts.heldout


def test_texts_lie_beside_the_checkpoint_unless_told(example, tmp_path):
    args = example.parse(["--output-dir", str(tmp_path / "model")])
    assert args.heldout == tmp_path / "heldout.txt"
    args = example.parse(["--output-dir", str(tmp_path), "--heldout", "elsewhere.txt"])
    assert args.heldout == Path("elsewhere.txt")
