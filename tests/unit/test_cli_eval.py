"""``megatron-quant eval DIR --text FILE``: its figures, and what it refuses."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.dist import checkpoints
from tests.dist.command import Ended, command
from tests.unit.report_pages import read


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    return path


def evaluated(model: Path, text: Path, *flags: str) -> Ended:
    return command("eval", str(model), "--text", str(text), "--seq-length", "32", *flags)


def test_perplexity(model: Path, text: Path) -> None:
    ended = evaluated(model, text, "--max-tokens", "64")
    assert (ended.status, ended.err) == (0, "")
    assert re.fullmatch(r"perplexity [\d.]+ \(64 tokens\)\n", ended.out)


def test_divergence_from_itself_is_zero_and_figures_as_json(
    model: Path, text: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    flags = ["--against", str(model), "--json", str(figures), "--max-tokens", "64"]
    ended = evaluated(model, text, *flags)
    assert ended.status == 0
    assert ", KL 0.00000 (64 tokens)" in ended.out
    found = json.loads(figures.read_text())
    assert set(found) == {"perplexity", "kl", "tokens"}
    assert (found["kl"], found["tokens"]) == (0.0, 64)


def test_a_report_has_the_figures_by_position_and_class(
    model: Path, text: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    flags = [
        "--against",
        str(model),
        "--report",
        str(report),
        "--log-to",
        f"tensorboard:{tmp_path}/tb",
    ]
    ended = evaluated(model, text, *flags, "--max-tokens", "64")
    assert ended.status == 0, ended.err
    found = json.loads(report.with_suffix(".json").read_text())
    assert f"perplexity {found['perplexity']:.4f}, KL 0.00000 (64 tokens)" in ended.out
    assert (found["command"], found["model"], found["text"]) == ("eval", str(model), str(text))
    assert [p["label"] for p in found["positions"]] == [str(i) for i in range(1, 33)]
    assert {p["tokens"] for p in found["positions"]} == {2}
    names = {p["label"]: p["tokens"] for p in found["classes"]}
    # each character is a token
    predicted = text.read_text()[1:65]
    assert names["spaces"] == predicted.count(" ")
    assert names["punctuation"] == predicted.count(".")
    assert names["first of a word"] == len(predicted.split()) - 1
    assert sum(names.values()) == 64
    for parts in (found["positions"], found["classes"]):
        nll = sum(math.log(p["perplexity"]) * p["tokens"] for p in parts)
        assert math.exp(nll / 64) == pytest.approx(found["perplexity"])
    page = read(report.read_text())
    assert [s.attributes["id"] for s in page.all("section")] == ["positions", "classes"]
    assert len(list((tmp_path / "tb").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--report", "/no/r.html"], "--report /no/r.json is in a directory that does not exist"),
        (["--log-to", "comet"], "--log-to 'comet' names no tracker: give mlflow"),
        (["--seq-length", "0"], "--seq-length is 0: give at least 1"),
        (["--max-tokens", "0"], "--max-tokens is 0: give at least 1"),
        (["--max-tokens", "8"], "9 tokens do not fill a window of 32 and the label after it; give"),
        (["--text", "/no/such"], "/no/such: not a readable UTF-8 text file"),
        (["--json", "/no/such/f.json"], "--json /no/such/f.json is in a directory that does not"),
        (["--json", "."], "--json . is a directory; choose another file"),
        (["--against", "/no/such"], "/no/such does not exist; give a checkpoint directory"),
    ],
)
def test_bad_flags(flags: list[str], words: str, model: Path, text: Path) -> None:
    ended = evaluated(model, text, *flags)
    assert ended.status == 1
    assert ended.err.startswith("megatron-quant: error: ") and ended.err.count("\n") == 1
    assert words in ended.err


def test_a_checkpoint_that_does_not_exist(text: Path) -> None:
    ended = evaluated(Path("/no/such"), text)
    assert ended.status == 1
    assert ended.err.startswith("megatron-quant: error: /no/such") and ended.err.count("\n") == 1
