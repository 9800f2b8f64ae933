"""Sections on calibration data: tokens of experts, ranges of inputs, and times."""

from collections.abc import Mapping
from statistics import median

from megatron_quant.report.facts import Quantized
from megatron_quant.report.grids import Cell, Grid, draw, key, legend
from megatron_quant.report.layers import (
    Range,
    cache_ranges,
    cold_experts,
    experts_of,
    ranges,
    tokens_of,
)
from megatron_quant.report.markup import Child, Markup, joined, tag
from megatron_quant.report.plots import Frame, plot, reach
from megatron_quant.report.scales import Scale, plural, scale_of, seconds, short, whole
from megatron_quant.report.tables import Column, bar, details, table

_NAMED = 20  # experts of a layer that a row names


def experts(facts: Quantized) -> Markup | None:
    """Return the tokens by layer and expert, cold ones marked; None without experts and data."""
    tokens, cold = tokens_of(facts), cold_experts(facts)
    if not tokens and not cold:
        return None
    every = sorted(experts_of(facts))
    layers = sorted({layer for layer, _ in every})
    numbers = sorted({expert for _, expert in every})
    scale = scale_of((n for n in tokens.values() if n), log=True)
    grid = Grid(
        key="experts",
        title="Tokens by layer and expert",
        about=f"Rows are layers, columns experts. A stronger colour: more tokens. {_said(facts)}",
        rows=[f"layer {layer}" for layer in layers],
        columns=[str(number) for number in numbers],
        across="expert",
        cells={
            (layers.index(at[0]), numbers.index(at[1])): _expert(at, tokens, at in cold, scale)
            for at in every
        },
    )
    keys = [tag("p", {"class": "legend"}, key("cross", "cold: no token"))]
    if tokens:
        keys = [legend(scale, "tokens", ("cross", "cold: no token"))]
    lists = [details("The tokens as numbers", _by_layer(tokens))] if tokens else []
    return joined([tag("p", {}, _said(facts)), draw(grid), *keys, *_cold_table(cold), *lists])


def _said(facts: Quantized) -> str:
    tokens, cold = tokens_of(facts), cold_experts(facts)
    took = "They took what their layer measured."
    if cold:
        said = (
            f"{plural(len(cold), 'expert')} of {whole(len(experts_of(facts)))} saw no token. {took}"
        )
    else:
        said = "Every expert saw tokens."
    if not tokens:
        return f"{said} This run did not count tokens."
    found = sorted(tokens.values())
    return (
        f"{said} An expert saw {whole(found[0])} to {whole(found[-1])}, median {median(found):g}."
    )


def _expert(
    at: tuple[int, int], tokens: Mapping[tuple[int, int], int], cold: bool, scale: Scale
) -> Cell:
    name = f"layer {at[0]}, expert {at[1]}"
    if cold or tokens.get(at) == 0:
        return Cell("empty", f"{name}: cold, no token", "cross")
    if at not in tokens:
        return Cell("empty", f"{name}: saw tokens")
    return Cell(f"q{scale.level(tokens[at])}", f"{name}: {plural(tokens[at], 'token')}")


def _cold_table(cold: set[tuple[int, int]]) -> list[Markup]:
    if not cold:
        return []
    by_layer: dict[int, list[int]] = {}
    for layer, expert in sorted(cold):
        by_layer.setdefault(layer, []).append(expert)
    rows: list[list[Child]] = []
    for layer, found in by_layer.items():
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        names = ", ".join(map(str, found[:_NAMED])) + more
        rows.append([f"layer {layer}", whole(len(found)), names])
    columns = (Column("Layer"), Column("Cold", True), Column("Experts", text=True))
    return [details("The cold experts by layer", table("Cold experts", columns, rows))]


def _by_layer(tokens: Mapping[tuple[int, int], int]) -> Markup:
    layers: dict[int, list[int]] = {}
    for (layer, _), count in sorted(tokens.items()):
        layers.setdefault(layer, []).append(count)
    rows: list[list[Child]] = [
        [f"layer {layer}", *(whole(n) for n in (min(t), round(median(t)), max(t), sum(t)))]
        for layer, t in layers.items()
    ]
    columns = (Column("Layer"), *(Column(n, True) for n in ("Least", "Median", "Most", "All")))
    return table("Tokens of a layer's experts", columns, rows)


def inputs(facts: Quantized) -> Markup | None:
    """Return the ranges of inputs by kind of weight and layer; None where none was measured."""
    found = ranges(facts.weights, facts.input_amax) | cache_ranges(facts.kv_amax)
    if not found:
        return None
    every = [r for layers in found.values() for r in layers.values()]
    y = scale_of((v for r in every for v in (r.low, r.high)), log=True)
    panels = [_panel(i, name, layers, y) for i, (name, layers) in enumerate(found.items())]
    rows: list[list[Child]] = [
        [name, short(min(r.low for r in own.values())), short(max(r.high for r in own.values()))]
        for name, own in found.items()
    ]
    columns = (Column("Inputs of"), Column("Least", True), Column("Largest", True))
    said = (
        "The largest magnitude that each layer's inputs had. A line reaches from the expert that "
        "saw least to the one that saw most."
    )
    return joined(
        [
            tag("p", {}, said),
            tag("div", {"class": "panels"}, *panels),
            details("The ranges as numbers", table("Largest inputs", columns, rows)),
        ]
    )


def _panel(index: int, name: str, layers: Mapping[int | None, Range], y: Scale) -> Markup:
    numbered = {layer: r for layer, r in layers.items() if layer is not None}
    points = numbered or dict(enumerate(layers.values()))
    frame = Frame(
        key=f"inputs{index}",
        title=f"Largest inputs of {name}",
        about=f"By layer, from {short(y.low)} to {short(y.high)}, logarithmic.",
        x=Scale(min(points), max(points), counts=True),
        y=y,
        across="layer",
    )
    marks = [
        reach(frame, layer, r.low, r.high, f"layer {layer}: {_range(r)}")
        for layer, r in sorted(points.items())
    ]
    return tag("figure", {}, tag("figcaption", {}, name), plot(frame, marks))


def _range(found: Range) -> str:
    if found.low == found.high:
        return short(found.high)
    return f"{short(found.low)} to {short(found.high)}"


def times(facts: Quantized) -> Markup:
    """Return the seconds of each phase."""
    longest = max(facts.seconds.values(), default=0.0) or 1.0
    rows: list[list[Child]] = [
        [name, seconds(taken), bar([("now", taken / longest)], seconds(taken))]
        for name, taken in facts.seconds.items()
    ]
    return table("Time by phase", (Column("Phase"), Column("Time", True), Column("Share")), rows)
