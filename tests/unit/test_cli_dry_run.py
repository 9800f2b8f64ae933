"""``quantize --dry-run``: the whole plan from config.json alone, and nothing written."""

import json
import re
from pathlib import Path

import pytest

from megatron_quant.cli.collapse import collapse, spelled
from megatron_quant.cli.tables import statistics_table
from megatron_quant.models.registry import lookup
from tests.dist.command import Ended, command, tree
from tests.unit import tiny

MODEL = {**tiny.config("qwen3_moe"), "hidden_size": 128, "moe_intermediate_size": 128}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with config.json and nothing else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    return tmp_path / "model"


def dry_run(model: Path, *flags: str) -> Ended:
    argv = ["quantize", "--hf-model-id", str(model), "--export-quant-cfg", "nvfp4", "--dry-run"]
    return command(*argv, *flags)


def rows(out: str) -> list[list[str]]:
    """The cells of every table row."""
    lines = [line for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def spelled_out(name: str) -> list[str]:
    """``experts.{0..3}.w`` -> the four names."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not found:
        return [name]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [name.replace(found[0], str(n)) for n in numbers]


def test_every_weight_once_with_bucket_rule_and_bytes(model: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    ended = dry_run(model, "--verbose")
    assert (ended.status, ended.err) == (0, "")
    weights = [row for row in rows(ended.out) if len(row) == 7]
    names = [name for row in weights for name in spelled_out(row[0])]
    expected = [s.name for p in lookup(MODEL).params(MODEL) for s in p.sources]
    assert sorted(names) == sorted(expected)
    by_name = {row[0]: row[1:] for row in weights}
    experts = by_name["model.layers.1.mlp.experts.{0..3}.down_proj.weight"]
    # nvfp4: half a byte an element, a byte for 16 of them, and fp32 scales of weight and input
    elements = 4 * 128 * 128
    assert (elements * 2, elements // 2 + elements // 16 + 4 * 8) == (131_072, 36_896)
    assert experts == ["4", "128x128", "nvfp4 g16 x nvfp4", "rule 1", "131.1 KB", "36.9 KB"]
    assert by_name["model.norm.weight"][2:4] == ["excluded", "norm"]
    assert by_name["lm_head.weight"][2:4] == ["excluded", "output"]
    assert tree(tmp_path) == before


def test_places_of_factors_and_those_that_are_left_out(model: Path) -> None:
    argv = ("--export-quant-cfg", "w4a16_nvfp4", "--algorithm", "awq")
    shown = [row for row in rows(dry_run(model, *argv).out) if len(row) == 3 and "proj" in str(row)]
    up, layers = "model.layers.{0..1}.mlp.experts.{0..3}.up_proj", "{0..1}"
    assert [up, "8", "into 1 weights"] in shown
    assert [f"model.layers.{layers}.self_attn.v_proj", "2", "into 1 weights"] in shown
    cached = rows(dry_run(model, *argv, "--export-kv-cache-quant", "fp8").out)
    why = "no: the scale of the KV cache is that of values as they are"
    assert [f"model.layers.{layers}.self_attn.v_proj", "2", why] in cached


def test_the_export_is_shown_of_a_run_that_would_only_save(model: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    ended = dry_run(model, "--megatron-save-path", str(tmp_path / "saved"))
    assert (ended.status, ended.err) == (0, "")
    assert rows(ended.out) == rows(dry_run(model).out) != []
    assert tree(tmp_path) == before


def test_like_layers_share_a_row(model: Path) -> None:
    config = {**MODEL, "num_hidden_layers": 94, "num_experts": 128}
    (model / "config.json").write_text(json.dumps(config))
    out = dry_run(model, "--max-shard-size", "1MB").out
    assert len(out.splitlines()) < 60
    weights = {row[0]: row[1:] for row in rows(out) if len(row) == 7}
    name = "model.layers.{0..93}.mlp.experts.{0..127}.down_proj.weight"
    count, shape, bucket, rule, before, _ = weights[name]
    assert (count, shape, rule) == (str(94 * 128), "128x128", "rule 1")
    assert (bucket, before) == ("nvfp4 g16 x nvfp4", "394.3 MB")  # 94 * 128 * 128 * 128 * 2
    (files,) = (row for row in rows(out) if row[0].startswith("model-"))
    found = re.fullmatch(r"model-00001-of-(\d+)\.safetensors to model-(\d+)-of-\1\.s.*", files[0])
    assert found and found[1] == found[2] and int(found[1]) > 100


@pytest.mark.parametrize(
    ("numbers", "text"), [([7], "7"), ([0, 1, 2], "{0..2}"), ([9, 0, 5, 6], "{0,5..6,9}")]
)
def test_numbers_are_spelled_in_runs(numbers: list[int], text: str) -> None:
    assert spelled(numbers) == text


def test_rows_of_other_experts_or_kinds_stay_apart() -> None:
    names = [f"m.layers.{i}.experts.{e}.w" for i in range(3) for e in range(2 + (i == 2))]
    names += ["m.layers.0.q.w", "m.layers.1.q.w", "mtp.layers.0.q.w", "head.w"]
    kinds = {"m.layers.1.q.w": 4}
    rows = list(collapse(names, str, lambda name: kinds.get(name, 8)))
    assert [name for name, _ in rows] == [
        "m.layers.{0..1}.experts.{0..1}.w",
        "m.layers.2.experts.{0..2}.w",
        "m.layers.0.q.w",
        "m.layers.1.q.w",
        "mtp.layers.0.q.w",
        "head.w",
    ]
    assert sorted(n for _, members in rows for n in members) == sorted(names)


def test_statistics_share_rows_with_their_ends() -> None:
    found = [(f"decoder.layers.{i}.fc1.amax", (1,), float(i + 1)) for i in range(3)]
    (name, shape, values) = (next(iter(c.cells)) for c in statistics_table(found).columns)
    assert (name, shape) == ("decoder.layers.{0..2}.fc1.amax", "(1,)")
    assert values == "1.0000e+00 to 3.0000e+00"
    assert statistics_table(found, verbose=True).row_count == 3


def test_rules_files_and_sizes(model: Path) -> None:
    out = dry_run(model, "--max-shard-size", "200KB", "--verbose").out
    titles = [line.strip() for line in out.splitlines()]
    assert {"Weights", "Coverage", "Files"} <= set(titles)
    files = [row[0] for row in rows(out) if row[0].startswith("model-")]
    assert len(files) > 1
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in _from_one(files)]
    assert re.search(r"^size: [\d.]+ KB -> [\d.]+ KB \([\d.]+x smaller\)$", out, re.MULTILINE)


def _from_one(items: list[str]) -> range:
    return range(1, len(items) + 1)


def test_weight_only_drops_the_inputs(model: Path) -> None:
    out = dry_run(model, "--weight-only").out
    assert "nvfp4 g16 " in out and "x nvfp4" not in out


def test_any_layout_without_its_ranks(model: Path) -> None:
    one, planned_one = dry_run(model).out.split("planned in ")
    four, planned_four = dry_run(model, "--tp", "4", "--ep", "2").out.split("planned in ")
    stages, _ = dry_run(model, "--pp", "2", "--tp", "2").out.split("planned in ")
    assert one == four == stages
    line = r"^bytes a rank writes, of {}: [\d.]+ KB to [\d.]+ KB \(imbalance ([\d.]+)\)$"
    assert re.search(line.format(1).replace(r"([\d.]+)", "1.000"), planned_one, re.MULTILINE)
    found = re.search(line.format(4), planned_four, re.MULTILINE)
    assert found and 1 <= float(found[1]) < 1.5
    assert re.match(r"[\d.]+ s", planned_four)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "3"], "--tp 3 does not divide the attention heads (8); use one of 1, 2, 4, 8"),
        (
            ["--pp", "3"],
            "--pp 3 is more stages than the model has layers (2); give at most as many",
        ),
        (["--pp", "0"], "--pp is 0: give at least 1"),
        (["--export-quant-cfg", "fp9"], "choose one of fp8, fp8_attention_nvfp4_mlp"),
        (["--hf-model-id", "/no/such"], "/no/such does not exist; give a checkpoint directory"),
        (["--max-shard-size", "big"], "--max-shard-size 'big' is no size: write it as 5GB"),
    ],
)
def test_what_cannot_run_is_refused(flags: list[str], words: str, model: Path) -> None:
    ended = dry_run(model, *flags)
    assert ended.status == 1
    assert ended.err.startswith("megatron-quant: error: ") and ended.err.count("\n") == 1
    assert words in ended.err


@pytest.mark.parametrize("flag", ["--report", "--log-to"])
def test_a_plan_has_nothing_to_report(flag: str, model: Path) -> None:
    ended = dry_run(model, flag, "tensorboard")
    said = f"--dry-run measures nothing that {flag} could say: leave one out\n"
    assert (ended.status, ended.err.endswith(said)) == (1, True)
