"""The command as users start it: torchrun, tensor and expert parallel."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist import checkpoints
from tests.dist.command import command, quantize_argv, spoiled, tree
from tests.dist.pool import Ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "quantize.py"
EXPERT = "model.layers.1.mlp.experts.7.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"))


def torchrun(ranks: int, *argv: str) -> "subprocess.CompletedProcess[str]":
    """The example's script; ``argv`` as of the verb ``quantize``."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += ["--nproc-per-node", str(ranks)]
    assert argv[0] == "quantize"
    return subprocess.run(
        [*run, str(EXAMPLE), *argv[1:]], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_quantized_checkpoint_with_its_tables_and_report(source: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    done = torchrun(4, *quantize_argv(source, out, report=report), "--verbose")
    assert done.returncode == 0, done.stderr
    _check_console(done.stdout)
    _check_report(json.loads(report.read_text()))
    verified = command("verify", str(out), "--against", str(source))
    assert verified.status == 0, verified.err
    _check_eval(out, source, tmp_path)


def _check_console(out: str) -> None:
    assert out.count("Quantization Statistics") == 1  # of one rank
    head = next(line for line in out.splitlines() if "Parameter Name" in line)
    assert [cell.strip() for cell in head.strip("┃").split("┃")] == [
        "Parameter Name",
        "Shape",
        "Max Value",
    ]
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    values = {name.strip(): (shape.strip(), float(value)) for name, shape, value in rows}
    shape, value = values["decoder.layers.0.mlp.experts.linear_fc1.weight_quantizer._amax"]
    assert shape == "()" and value > 0
    assert "decoder.layers.1.self_attention.linear_qkv.weight_quantizer._amax" in values
    assert re.search(r"^verified: 69 tensors$", out, re.MULTILINE)
    assert re.search(r"^size: 4\.07 MB -> 1\.\d+ MB \(3\.\d+x smaller\)$", out, re.MULTILINE)
    assert re.search(r"^time: plan [\d.]+ s, load .*, export .*, verify [\d.]+ s$", out, re.M)
    assert "\r" not in out  # no progress bars where there is no terminal


def _check_report(report: dict) -> None:
    assert report["recipe"] == "nvfp4"
    assert report["bytes_before"] > 3 * report["bytes_after"]
    assert set(report["seconds"]) >= {"plan", "load", "attach", "calibrate", "export", "verify"}
    expert = "decoder.layers.1.mlp.experts.linear_fc2.weight7"
    assert report["weight_amax"][expert] > 0
    assert len(report["weight_amax"]) == 36
    assert report["input_amax"] == report["expert_tokens"] == {}


def _check_eval(out: Path, source: Path, folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    flags = ["--text", str(text), "--against", str(source), "--seq-length", "64"]
    ended = command("eval", str(out), *flags)
    assert ended.status == 0, ended.err
    kl = re.search(r"KL ([\d.]+) ", ended.out)
    assert kl and 0 < float(kl[1]) < 1


def test_a_bad_weight_ends_all_ranks(source: Path, tmp_path: Path) -> None:
    bad = spoiled(source, tmp_path / "bad", EXPERT, float("nan"))
    before = tree(tmp_path)
    done = torchrun(2, *quantize_argv(bad, tmp_path / "out", ep=1))
    assert done.returncode != 0
    said = re.findall(r"^\[rank (\d)\] megatron-quant: error: (.*)$", done.stderr, re.MULTILINE)
    ((rank, text),) = said  # told once, by one of the two ranks, which both hold the expert
    assert rank in "01"
    assert text == (
        f"{bad}: {EXPERT} has NaN or Inf; repair the checkpoint or fetch it again (on 2 ranks)"
    )
    assert "megatron_quant/" not in done.stderr  # no traceback but torchrun's own, of its agent
    assert tree(tmp_path) == before


def test_the_report_of_a_calibrated_run(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    few = {"calib_dataset": __file__, "calib_size": 2, "calib_seq_length": 4}
    argv = quantize_argv(
        source, tmp_path / "out", report=report, weight_only=None, cold_experts="layer-max", **few
    )
    first, second = ranks(2, command, *argv)
    assert (first.status, second.status, second.out) == (0, 0, "")
    found = json.loads(report.read_text())
    tokens = found["expert_tokens"]
    assert sum(tokens.values()) == 2 * 4 * 2 * 2 * 2  # samples, tokens, top 2, layers, fc1 and fc2
    assert found["cold_experts"] and all(tokens[name] == 0 for name in found["cold_experts"])
    assert all(torch.tensor(list(found["input_amax"].values())) > 0)
    assert "saw no token and took their layer's largest input amax" in first.out
    assert "tokens an expert saw: 0 to " in first.out
