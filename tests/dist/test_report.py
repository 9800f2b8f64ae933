"""``--report OUT.html`` of real runs: its facts are those that the run measured."""

import json
from pathlib import Path

import pytest

import megatron_quant as mq
from megatron_quant.dist import Groups
from tests.dist import checkpoints
from tests.dist.command import command, quantize_argv, refused
from tests.dist.pool import Ranks
from tests.unit.report_pages import read, rows

FEW = {"calib_dataset": __file__, "calib_size": 2, "calib_seq_length": 8, "weight_only": None}
DOWN = "decoder.layers.1.mlp.experts.linear_fc2.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"))


def facts_of(report: Path) -> dict:
    return json.loads(report.with_suffix(".json").read_text())


def check(facts: dict, out: Path, source: Path) -> None:
    """What does not depend on how the run went: weights, bytes, errors, coverage."""
    verified = mq.verify(out, against=source)
    errors = {t.name: t.error for t in verified.tensors}
    weights = {w["name"]: w for w in facts["weights"]}
    assert {name: w["error"] for name, w in weights.items()} == errors
    assert facts["verified"] == len(verified.tensors) == 69
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sum(w["after"] for w in weights.values()) == index["metadata"]["total_size"]
    assert facts["bytes_after"] == index["metadata"]["total_size"]
    assert facts["bytes_before"] == sum(w["before"] for w in weights.values())
    expert = weights["model.layers.1.mlp.experts.5.down_proj.weight"]
    assert expert["family"] == "mlp.experts.down_proj"
    assert (expert["layer"], expert["expert"], expert["slot"]) == (1, 5, f"{DOWN}5")
    assert (expert["format"], expert["inputs"]) == ("nvfp4", "nvfp4")
    kept = weights["model.embed_tokens.weight"]
    assert (kept["format"], kept["layer"], kept["error"]) == ("", None, None)
    assert sum(row["weights"] for row in facts["coverage"]) == len({w["slot"] for w in weights.values()})
    assert (facts["command"], facts["model"]) == ("quantize", str(source))


def test_a_run_through_megatron(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.html"
    argv = quantize_argv(source, out, report=report, cold_experts="layer-max", **FEW)
    first, second = ranks(2, command, *argv)
    assert (first.status, second.status, second.out) == (0, 0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "report.html", "report.json"]
    facts = facts_of(report)
    check(facts, out, source)
    assert facts["ranks"] == 2 and facts["dtype"] == "bfloat16"
    tokens = facts["expert_tokens"]
    page = read(report.read_text())
    grid = next(page.one("experts").all("svg", "grid"))
    notes = {t.text for t in grid.all("title")}
    for expert in range(8):
        count = tokens[f"{DOWN}{expert}"]
        said = f"{count} token{'s' * (count != 1)}" if count else "cold, no token"
        assert f"layer 1, expert {expert}: {said}" in notes
    cold = {name.rpartition("weight")[2] for name in facts["cold_experts"]}
    assert len(list(grid.all("path", "cross"))) == len(facts["cold_experts"]) // 2 >= len(cold) // 2
    worst = max((w for w in facts["weights"] if w["error"]), key=lambda w: w["error"])
    tile = list(page.all("div", "tile"))[1]
    assert worst["name"] in tile.text and f"{worst['error']:.3g}" in tile.text
    assert {r[0] for r in rows(page.one("times"))} == set(facts["seconds"])


def test_a_streamed_run_says_the_same_of_the_same_bytes(
    source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    facts = []
    for name, flags in (("live", {}), ("streamed", {"stream": True, "tp": None, "ep": None})):
        out, report = tmp_path / name, tmp_path / f"{name}.html"
        argv = quantize_argv(source, out, report=report, **flags)
        assert [e.status for e in ranks(2, command, *argv)] == [0, 0]
        facts.append(facts_of(report))
        page = read(report.read_text())
        assert [s.attributes["id"] for s in page.all("section")] == [
            *("sizes", "errors", "coverage", "times")
        ]
    live, streamed = facts
    assert live["weights"] == streamed["weights"]
    assert live["coverage"] == streamed["coverage"]
    assert live["weight_amax"] == streamed["weight_amax"]


def test_a_search_that_quantizes(source: Path, tmp_path: Path) -> None:
    scores, again = tmp_path / "scores", tmp_path / "again.html"
    auto = mq.AutoQuantize(
        bits=6.0, formats="w4a16_nvfp4,fp8_channel", score_size=2, checkpoint=scores
    )
    few = mq.Calibration(dataset=__file__, size=2, seq_length=8, batch_size=2)
    out, report = tmp_path / "out", tmp_path / "report.html"
    streamed = mq.stream(
        source, None, out, auto=auto, calibration=few, groups=Groups(),
        format="compressed-tensors", report=report,
    )
    facts, found = facts_of(report), streamed.found
    assert found is not None
    assert facts["search"] == json.loads(json.dumps(found.document()))
    page = read(report.read_text())
    curve = next(page.one("frontier").all("svg", "plot"))
    (drawn,) = curve.all("path", "diamond")
    assert drawn.text.startswith(f"found: {found.bits:.3f} bits, score ")
    chosen = [r[1] for r in rows(page.one("scores"))]
    assert len(chosen) == len(found.rows)
    names = {"none": "as it was"}
    assert chosen == [names.get(action, action.replace("+", " × ")) for _, action, _ in found.rows]
    ended = command("search", str(scores), "--bits", "6", "--report", str(again))
    assert ended.status == 0, ended.err
    solved = facts_of(again)
    assert (solved["command"], solved["model"]) == ("search", str(scores))
    assert solved["search"] == facts["search"]
    assert [e.attributes["id"] for e in read(again.read_text()).all("section")] == [
        *("frontier", "choices", "scores")
    ]
    refused = command("search", str(scores), "--bits", "6", "--report", str(scores / "search.html"))
    assert refused.status == 1 and f"search.html lies in {scores}" in refused.err


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ("no/r.html", "is in a directory that does not exist; choose another file"),
        ("source/config.html", "lies in "),
        ("out/report.html", "lies in "),
    ],
)
def test_a_place_that_would_do_harm_is_refused(
    report: str, words: str, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    place = source.parent / source.name if report.startswith("source") else tmp_path
    path = place / Path(report).name if report.startswith("source") else tmp_path / report
    for flags in ({}, {"stream": True, "tp": None, "ep": None}):
        argv = quantize_argv(source, tmp_path / "out", report=path, **flags)
        assert words in refused(ranks, tmp_path, argv)
