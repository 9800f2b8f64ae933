"""Sections on weights: sizes, errors, and what was left as it is."""

from collections.abc import Iterable, Sequence
from statistics import median

from megatron_quant.report.facts import Quantized, Weight
from megatron_quant.report.grids import Cell, Grid, draw, legend
from megatron_quant.report.layers import columns_of, worst
from megatron_quant.report.markup import Child, Markup, joined, tag
from megatron_quant.report.scales import plural, scale_of, short, size, whole
from megatron_quant.report.tables import Column, bar, details, table

_BITS, _SHOWN = 8, 10
_KINDS = 4  # families that a row of exclusions names


def sizes(facts: Quantized) -> Markup:
    """Return the sizes by family and format."""
    groups: dict[tuple[str, str, str], list[Weight]] = {}
    for w in facts.weights:
        groups.setdefault((w.family, w.format, w.inputs), []).append(w)
    largest = max((sum(w.before for w in g) for g in groups.values()), default=1)
    rows = [_size_row(key, group, largest) for key, group in groups.items()]
    columns = (
        *(Column("Weights"), Column("Format"), Column("Count", True), Column("Before", True)),
        *(Column("After", True), Column("Bits a weight", True), Column("Share")),
    )
    return table(
        "Bytes by kind of weight: the pale bar is before, the strong one after", columns, rows
    )


def _size_row(key: tuple[str, str, str], group: Sequence[Weight], largest: int) -> list[Child]:
    family, fmt, inputs = key
    before, elements = sum(w.before for w in group), sum(w.elements for w in group)
    known = [w.after for w in group if w.after is not None]
    after = sum(known) if known else None
    name = f"{fmt} × {inputs}" if fmt and inputs else fmt or "as it was"
    bits = _BITS * after / elements if after is not None and elements else None
    parts = [("was", before / largest), ("now", (after or 0) / largest)]
    drawn = bar(parts if after is not None else parts[:1], f"{size(before)} to {size(after)}")
    return [family, name, whole(len(group)), size(before), size(after), short(bits), drawn]


def errors(facts: Quantized) -> Markup | None:
    """Return the relative errors by family and layer; None where nothing was compared."""
    compared = [w for w in facts.weights if w.format and w.error is not None]
    if not compared:
        return None
    families, columns = (
        list(dict.fromkeys(w.family for w in compared)),
        columns_of(w.layer for w in compared),
    )
    at: dict[tuple[int, int], list[Weight]] = {}
    for w in compared:
        at.setdefault((families.index(w.family), columns.index(w.layer)), []).append(w)
    scale = scale_of((w.error or 0.0 for w in compared), log=True)
    top = worst(compared)
    grid = Grid(
        key="errors",
        title="Largest relative error by kind of weight and layer",
        about=f"Rows are kinds of weights, columns layers. A stronger colour: more. {_worst(top)}",
        rows=families,
        columns=columns.labels,
        across="layer",
        cells={
            place: Cell(
                f"q{scale.level(_largest(own))}",
                f"{families[place[0]]}, layer {columns.labels[place[1]]}: {_spread(own)}",
                "ring" if top in own else "",
            )
            for place, own in at.items()
        },
    )
    return joined(
        [
            tag("p", {}, _worst(top)),
            draw(grid),
            legend(scale, "", ("ring", "the worst")),
            details("The errors as numbers", _error_table(compared), _worst_table(compared)),
        ]
    )


def _worst(found: Weight | None) -> str:
    assert found is not None and found.error is not None
    return f"The worst is {found.name}: {short(found.error)} ({found.format})."


def _errors(own: Iterable[Weight]) -> list[float]:
    return [w.error for w in own if w.error is not None]


def _largest(own: Iterable[Weight]) -> float:
    return max(_errors(own))


def _spread(own: Sequence[Weight]) -> str:
    found = _errors(own)
    if len(found) == 1:
        return f"{short(found[0])} ({own[0].format})"
    return f"up to {short(max(found))}, least {short(min(found))} of {len(found)} ({own[0].format})"


def _error_table(compared: Sequence[Weight]) -> Markup:
    groups: dict[tuple[str, str], list[float]] = {}
    for w in compared:
        groups.setdefault((w.family, w.format), []).append(w.error or 0.0)
    rows: list[list[Child]] = [
        [family, fmt, whole(len(e)), short(min(e)), short(median(e)), short(max(e))]
        for (family, fmt), e in groups.items()
    ]
    columns = (
        *(Column("Weights"), Column("Format"), Column("Count", True)),
        *(Column("Least", True), Column("Median", True), Column("Largest", True)),
    )
    return table("Relative error by kind of weight", columns, rows)


def _worst_table(compared: Sequence[Weight]) -> Markup:
    ranked = sorted(compared, key=lambda w: -(w.error or 0.0))[:_SHOWN]
    rows: list[list[Child]] = [[w.name, w.format, short(w.error)] for w in ranked]
    columns = (Column("Weight"), Column("Format"), Column("Error", True))
    return table(f"The {len(ranked)} weights that lost most", columns, rows)


def coverage(facts: Quantized) -> Markup:
    """Return what each rule decided, what was left as it is, and why."""
    rows: list[list[Child]] = [
        [
            row.rule,
            row.action,
            whole(row.weights),
            ", ".join(f"{pattern}: {whole(n)}" for pattern, n in row.patterns.items()),
        ]
        for row in facts.coverage
    ]
    columns = (
        Column("Rule", text=True),
        Column("Action"),
        Column("Weights", True),
        Column("Of each pattern", text=True),
    )
    found = [table("What each rule decided", columns, rows), _excluded(facts)]
    if facts.left_out:
        lines = (tag("li", {}, line) for line in facts.left_out)
        found += [tag("h3", {}, "In the source, not in the export"), tag("ul", {}, *lines)]
    return joined(found)


def _excluded(facts: Quantized) -> Markup:
    groups: dict[str, list[Weight]] = {}
    for w in facts.weights:
        if not w.format:
            groups.setdefault(w.rule, []).append(w)
    if not groups:
        return tag("p", {}, "Every weight is quantized.")
    rows: list[list[Child]] = [
        [rule, _kinds(own), whole(len(own)), size(sum(w.before for w in own))]
        for rule, own in groups.items()
    ]
    columns = (
        Column("Why", text=True),
        Column("Weights", text=True),
        Column("Tensors", True),
        Column("Bytes", True),
    )
    return table("What was left as it is, and why", columns, rows)


def _kinds(own: Sequence[Weight]) -> str:
    kinds = list(dict.fromkeys(w.family for w in own))
    more = len(kinds) - _KINDS
    shown = ", ".join(kinds[:_KINDS])
    return f"{shown} and {plural(more, 'more kind')}" if more > 0 else shown
