"""Reports: every fact is in the JSON and drawn on the page, which needs nothing beside itself."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_quant.errors import QuantError
from megatron_quant.report import (
    Facts,
    check_report_files,
    page_of,
    report_files,
    write_report_files,
)
from megatron_quant.report.scales import Scale, scale_of, short, size
from megatron_quant.report.searched import uniform
from megatron_quant.report.style import style
from tests.unit import report_world as world
from tests.unit.report_pages import Element, read, rows

NAMED = ("img", "script", "link", "iframe", "object", "embed", "audio", "video", "form")
"""Elements that load or run something."""


MADE = (world.facts(), world.evaluated(), world.sensitive())


@pytest.fixture(scope="module")
def facts() -> Facts:
    return world.facts()


@pytest.fixture(scope="module")
def page(facts: Facts) -> Element:
    return read(page_of(facts))


def test_the_verdict_comes_first(page: Element) -> None:
    tiles = [
        (t.children[0].text, t.children[1].text, t.children[2].text)
        for t in page.all("div", "tile")
    ]
    sizes = "from 967 KB: 3.07 times smaller, 5.2 bits for each of all weights"
    assert tiles[0] == ("Size", "314\u00a0KB", sizes.replace("967 ", "967\u00a0"))
    assert [name for name, _, _ in tiles[1:]] == [
        *("Bits a weight", "Worst relative error", "Cold experts", "KL divergence"),
        *("Perplexity", "Time"),
    ]
    assert tiles[2][1] == "0.183" and tiles[2][2].startswith("model.layers.1.mlp.experts.2.")
    assert tiles[3][1:] == ("! 3", "of 32 saw no token, in 2 layers")
    body = [e.name for e in page.all("body").__next__().children]
    assert body == ["header", "dl", "nav", "main", "footer"]


def test_errors_are_drawn_by_family_and_layer(page: Element, facts: Facts) -> None:
    part = page.one("errors")
    grid = next(part.all("svg", "grid"))
    assert (
        len([e for e in grid.all("rect", "mark") if "ring" not in e.attributes["class"]]) == 7 * 4
    )
    assert len(list(grid.all("rect", "ring"))) == 1
    notes = [t.text for t in grid.all("title")]
    assert "mlp.experts.up_proj, layer 3: up to" in " ".join(notes)
    table = rows(part)
    assert facts.quantized is not None
    errors = [w.error for w in facts.quantized.weights if w.family == "mlp.experts.down_proj"]
    (row,) = [r for r in table if r[0] == "mlp.experts.down_proj"]
    assert row[1:4] == ["nvfp4", "32", short(min(e for e in errors if e))]
    assert row[5] == short(max(e for e in errors if e))
    assert rows(part, 1)[0][2] == "0.183"


def test_experts_are_drawn_and_cold_ones_crossed(page: Element) -> None:
    part = page.one("experts")
    grid = next(part.all("svg", "grid"))
    assert len(list(grid.all("rect", "mark"))) == 4 * 8
    assert len(list(grid.all("rect", "empty"))) == len(list(grid.all("path", "cross"))) == 3
    cold = [t.text for t in grid.all("title") if "cold" in t.text]
    assert cold == [f"layer {layer}, expert {e}: cold, no token" for layer, e in world.COLD]
    assert rows(part) == [["layer 1", "1", "3"], ["layer 2", "2", "0, 5"]]


def test_experts_without_counts_are_drawn_all_the_same(facts: Facts) -> None:
    assert facts.quantized is not None
    streamed = replace(facts, quantized=replace(facts.quantized, expert_tokens={}))
    part = read(page_of(streamed)).one("experts")
    assert "This run did not count tokens." in part.text
    grid = next(part.all("svg", "grid"))
    assert len(list(grid.all("path", "cross"))) == 3


def test_inputs_have_a_panel_of_each_kind(page: Element) -> None:
    part = page.one("inputs")
    assert [f.text for f in part.all("figcaption")] == [
        *("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj"),
        *("mlp.experts.gate_proj+up_proj", "mlp.experts.down_proj"),
    ]
    assert len(list(part.all("circle", "mark"))) == 4 * 4


def test_keys_and_values_have_panels_beside_the_inputs(facts: Facts) -> None:
    assert facts.quantized is not None
    cache = {f"model.layers.{i}.self_attn.{kv}": 2.0 + i for i in range(4) for kv in ("k", "v")}
    part = read(page_of(replace(facts, quantized=replace(facts.quantized, kv_amax=cache))))
    figures = list(part.one("inputs").all("figure"))
    assert [f.children[0].text for f in figures][4:] == [
        *("KV cache: self_attn.k", "KV cache: self_attn.v")
    ]
    assert [t.text for t in figures[5].all("title")][1:] == [
        f"layer {i}: {2 + i}" for i in range(4)
    ]


def test_a_search_is_drawn(page: Element, facts: Facts) -> None:
    search = facts.search
    assert search is not None
    curve = next(page.one("frontier").all("svg", "plot"))
    positive = [p for p in search.frontier if p.score > 0]
    assert len(list(curve.all("circle", "mark"))) == len(positive) == 24
    (line,) = curve.all("path", "line")
    assert line.attributes["d"].count("V") == 24  # the found one is a point of the line too
    assert len(list(curve.all("rect", "square"))) == 2
    assert [e.text for e in curve.all("text", "name")] == ["nvfp4", "fp8"]
    (found,) = curve.all("path", "diamond")
    assert found.text == f"found: {search.bits:.3f} bits, score {short(search.score, 4)}"
    letters = [e.text for e in page.one("choices").all("text", "glyph")]
    assert len(letters) == 12 + 3  # and the key
    dots = [e for g in page.one("scores").all("svg", "grid") for e in g.all("circle", "dot")]
    quantized = [p for p in search.places if p.chosen.format != "none"]
    assert len(dots) == len(quantized)
    assert len(rows(page.one("scores"))) == 12


def test_uniform_recipes_cost_what_their_parts_do(page: Element, facts: Facts) -> None:
    assert facts.search is not None
    table = {r[0]: r[1:] for r in rows(page.one("frontier"))}
    total = sum(p.options[0].score for p in facts.search.places)
    assert table["nvfp4"] == ["4.500", short(total, 4)]
    assert table["fp8"] == ["8.000", short(total / 8, 4)]
    assert table["found"] == [f"{facts.search.bits:.3f}", short(facts.search.score, 4)]


def test_active_bits_count_experts_by_their_share(facts: Facts) -> None:
    assert facts.search is not None
    experts, *_ = (p for p in facts.search.places if p.family == "mlp.experts")
    (other, *_) = (p for p in facts.search.places if p.family != "mlp.experts")
    kept = replace(other, options=tuple(replace(o, chosen=True) for o in other.options[2:]))
    small = replace(experts, share=0.25)
    search = replace(facts.search, cost="active", places=(small, kept))
    points = uniform(search)
    assert points["nvfp4"].bits == pytest.approx((4.5 * 250 + 16 * 1000) / 1250)
    assert points["fp8"].score == experts.options[1].score


def test_what_was_excluded_and_why(page: Element) -> None:
    part = page.one("coverage")
    assert rows(part)[0] == ["rule 1: nvfp4 *", "nvfp4+nvfp4", "5", "*: 5"]
    assert ["router: never quantized", "mlp.gate", "4", "32.8\u00a0KB"] in rows(part, 1)
    assert "mtp.safetensors: weights that nothing names" in part.text
    assert rows(page.one("choices")) == [["lm_head", "no candidate quantizes it"]]


def test_times_and_sizes(page: Element) -> None:
    assert [r[:2] for r in rows(page.one("times"))][:2] == [["plan", "0.4 s"], ["load", "21.0 s"]]
    table = rows(page.one("sizes"))
    assert ["mlp.experts.up_proj", "nvfp4 × nvfp4", "32"] in [r[:3] for r in table]
    assert len(table) == 1 + 4 + 1 + 3 + 4 + 1


def test_a_run_that_only_saves_or_skips_the_verification_is_drawn(facts: Facts) -> None:
    assert facts.quantized is not None
    weights = tuple(replace(w, after=None, error=None) for w in facts.quantized.weights)
    none = {"bytes_before": None, "bytes_after": None, "verified": None, "dialect": ""}
    bare = replace(facts.quantized, weights=weights, fake_quant=None, left_out=(), **none)
    page = read(page_of(replace(facts, quantized=bare, search=None)))
    tiles = [(t.children[1].text, t.children[2].text) for t in page.all("div", "tile")]
    assert tiles[:2] == [("–", "nothing was exported"), ("–", "the export was not verified")]
    assert [s.attributes["id"] for s in page.all("section")] == [
        *("sizes", "experts", "inputs", "coverage", "times")
    ]
    assert {r[4] for r in rows(page.one("sizes"))} == {"–"}


def test_a_dense_model_without_data_has_no_experts_and_no_inputs() -> None:
    bare = world.quantized(experts=0)
    bare = replace(bare, expert_tokens={}, cold_experts=(), input_amax={})
    made = Facts(command="quantize", model="m", version="0", quantized=bare)
    page = read(page_of(made))
    assert [s.attributes["id"] for s in page.all("section")] == [
        *("sizes", "errors", "coverage", "times")
    ]
    assert not [t for t in page.all("div", "tile") if "experts" in t.text]


def test_families_are_drawn() -> None:
    page = read(page_of(world.sensitive()))
    tile = next(page.all("div", "tile"))
    assert [c.text for c in tile.children] == [
        *("Loses most", "0.04", "experts in nvfp4, KL in nats a token")
    ]
    table = rows(page.one("families"))
    assert [r[:5] for r in table][1::2] == [
        ["experts", "nvfp4", "90\u202f000", "4.500", "0.04"],
        ["KV cache", "fp8", "–", "8.000", "0.001"],
    ]
    widths = [float(r.attributes["width"]) for r in page.one("families").all("rect", "mark")]
    assert widths == [60, 120, 15, 3]
    assert "lm_head: no format quantizes it" in page.one("families").text
    document = world.sensitive().document()["sensitivity"]
    assert (document["tokens"], document["rows"][2]["kl"]) == (512, 0.005)


def test_an_evaluation_is_drawn() -> None:
    page = read(page_of(world.evaluated()))
    panels = list(page.one("positions").all("svg", "plot"))
    assert [len(list(p.all("circle", "mark"))) for p in panels] == [32, 32]
    assert rows(page.one("positions"))[0] == ["1 to 16", "160", "30", "0.05"]
    assert [r[0] for r in rows(page.one("classes"))][-1] == "line ends"
    assert len(list(page.one("classes").all("svg", "bar"))) == 5


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.command)
def test_the_page_needs_nothing_beside_itself(made: Facts) -> None:
    page = page_of(made)
    root = read(page)
    assert [e.name for e in root.all() if e.name in NAMED] == []
    assert re.findall(r"https?:|url\(|@import", page) == []
    policy = [e.attributes["content"] for e in root.all("meta") if "http-equiv" in e.attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not any(name.startswith("on") for e in root.all() for name in e.attributes)


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.command)
def test_the_page_can_be_read_without_seeing_it(made: Facts) -> None:
    root = read(page_of(made))
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for svg in root.all("svg"):
        named = svg.attributes.get("aria-labelledby", "").split()
        assert set(named) <= set(ids)
        says = named or svg.attributes.get("aria-label") or svg.attributes.get("aria-hidden")
        assert says, svg
    for link in root.all("a"):
        assert link.attributes["href"].removeprefix("#") in ids
    assert all(h.attributes["scope"] in ("col", "row") for h in root.all("th"))
    assert [e.attributes["lang"] for e in root.all("html")] == ["en"]
    assert len(list(root.all("h1"))) == 1


@pytest.mark.parametrize(
    "name", ["</title><script>x()</script>", 'a" onload="x()', "a\nb", "\u202eab"]
)
def test_names_are_text(name: str) -> None:
    made = replace(world.facts(), model=name)
    page = page_of(made)
    root = read(page)
    (head,) = root.all("h1")
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    assert head.text == shown
    assert list(root.all("script")) == []


def colours(dark: bool) -> dict[str, str]:
    light, _, rest = style().partition("@media (prefers-color-scheme: dark)")
    part = rest.split("}\n}")[0] if dark else light
    return dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", part))


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        flat = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * flat[0] + 0.7152 * flat[1] + 0.0722 * flat[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_marks_stand_out(dark: bool) -> None:
    found = colours(dark)
    assert {f"q{i}" for i in range(9)} <= set(found)
    for text in ("ink", "soft", "accent", "look", "good"):
        for ground in ("paper", "card"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    assert all(contrast(found["ink"], found[f"k{i}"]) >= 4.5 for i in range(6))
    assert contrast(found["look"], found["empty"]) >= 3
    levels = [contrast(found[f"q{i}"], found["card"]) for i in range(9)]
    assert levels == sorted(levels)


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ([0, 10], False, [0, 5, 10]),
        ([0.02, 3.5], True, [0.1, 1]),
        ([2, 7], True, [2, 5]),
        ([5, 5], False, [5]),
        ([0, 0], True, [1.0]),
        ([0, 3], False, [0, 1, 2, 3]),
    ],
)
def test_ticks_are_round(values: list[float], log: bool, ticks: list[float]) -> None:
    assert scale_of(values, log).ticks() == pytest.approx(ticks)


def test_values_have_a_place_whatever_they_are() -> None:
    scale = Scale(0.01, 100, log=True)
    assert [scale.level(v) for v in (0, 0.01, 1, 100, 1e9)] == [0, 0, 4, 8, 8]
    assert Scale(1, 1).at(1) == 0.5
    assert (size(999), size(1500), size(None)) == ("999\u00a0B", "1.5\u00a0KB", "–")


def test_the_document_has_all_facts_and_only_finite_numbers(facts: Facts) -> None:
    quantized = facts.quantized
    assert quantized is not None
    found = json.loads(json.dumps(facts.document(), allow_nan=False))
    assert found["recipe"] == "nvfp4"
    assert found["weights"][1]["error"] == quantized.weights[1].error
    assert len(found["weights"]) == len(quantized.weights)
    assert found["expert_tokens"] == dict(quantized.expert_tokens)
    assert found["fake_quant"] == {"perplexity": 12.3456, "kl": 0.0123, "tokens": 4096}
    assert len(found["search"]["places"]) == 12
    first, *others = quantized.weights
    weights = (replace(others[0], error=float("nan")), *others[1:])
    amaxes = {**quantized.input_amax, first.slot: float("inf")}
    odd = replace(facts, quantized=replace(quantized, input_amax=amaxes, weights=(first, *weights)))
    document = odd.document()
    assert document["input_amax"][first.slot] is document["weights"][1]["error"] is None
    assert "nan" not in read(page_of(odd)).text
    assert world.evaluated().document()["positions"][0]["label"] == "1 to 16"


def test_a_page_brings_its_facts_and_a_json_file_comes_alone(facts: Facts, tmp_path: Path) -> None:
    assert report_files(Path("a.html")) == (Path("a.json"), Path("a.html"))
    write_report_files(tmp_path / "a.html", facts)
    write_report_files(tmp_path / "b.json", facts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.json", "b.json"]
    assert (tmp_path / "a.html").read_text() == page_of(facts)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_report_is_there_whole_or_as_it_was(
    facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report_files(tmp_path / "a.html", facts)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(QuantError, match=r"a\.json cannot be written: No space left on device;"):
        write_report_files(tmp_path / "a.html", world.evaluated())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(QuantError, match=r"--report .*a\.json is a directory; choose another file"):
        check_report_files(tmp_path / "a.html")
    with pytest.raises(QuantError, match="is in a directory that does not exist"):
        check_report_files(tmp_path / "no" / "b.html")
    check_report_files(tmp_path / "b.html")
