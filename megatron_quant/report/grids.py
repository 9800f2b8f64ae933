"""Grids of cells: heat maps, and maps of names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_quant.report.markup import Markup, joined, tag
from megatron_quant.report.scales import LEVELS, Scale, short
from megatron_quant.report.tables import scrolling

_TITLED = 6000  # cells of a grid that each say what they are: more would make a page slow
_APART = 22  # least pixels between labels of columns
_LETTER = 6.4  # pixels of a character of a label
_SIDES = ((24, 24), (64, 16), (1 << 30, 9))
"""Most columns -> pixels of a cell."""
_ROWS_LEFT = 12  # pixels between labels and cells


@dataclass(frozen=True)
class Cell:
    """A cell of a grid.

    Attributes:
        look: Class of its colour, such as ``q3``.
        note: What it says when it is pointed at.
        mark: ``cross``, ``ring`` or ``dot``, or a character to write; empty for none.
    """

    look: str
    note: str
    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of cells.

    Attributes:
        key: A word that no other drawing of the page has.
        title: What it shows.
        about: How to read it, for those who cannot see it.
        rows: Label of each row.
        columns: Label of each column.
        across: What the columns are.
        cells: Cells by row and column; others stay empty.
    """

    key: str
    title: str
    about: str
    rows: Sequence[str]
    columns: Sequence[str]
    across: str
    cells: Mapping[tuple[int, int], Cell]


def draw(grid: Grid) -> Markup:
    """Return a grid as SVG that scrolls sideways where the screen is too narrow."""
    side = next(n for most, n in _SIDES if len(grid.columns) <= most)
    left = _LETTER * max((len(row) for row in grid.rows), default=0) + _ROWS_LEFT
    width = left + side * len(grid.columns) + 8
    height = 20.0 + side * len(grid.rows) + 20
    titled = len(grid.cells) <= _TITLED
    parts = [
        tag("title", {"id": f"{grid.key}-t"}, grid.title),
        tag("desc", {"id": f"{grid.key}-d"}, grid.about),
        *_labels(grid, left, side),
        *(
            _cell(cell, left + side * column, 20.0 + side * row, side, titled)
            for (row, column), cell in sorted(grid.cells.items())
        ),
    ]
    svg = tag(
        "svg",
        {
            "class": "grid",
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
            "width": round(width),
            "height": round(height),
            "role": "img",
            "aria-labelledby": f"{grid.key}-t {grid.key}-d",
        },
        joined(parts),
    )
    return scrolling(grid.title, svg)


def _labels(grid: Grid, left: float, side: int) -> list[Markup]:
    every = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64) if n * side >= _APART or n == 64)
    found = [
        tag(
            "text",
            {"x": left - 8, "y": 20.0 + side * (i + 0.5), "class": "row", "dy": "0.35em"},
            row,
        )
        for i, row in enumerate(grid.rows)
        if side >= 12 or i % 2 == 0
    ]
    found += [
        tag("text", {"x": left + side * (i + 0.5), "y": 12.0, "class": "col"}, column)
        for i, column in enumerate(grid.columns)
        if i % every == 0
    ]
    under = 20.0 + side * len(grid.rows) + 14
    return [*found, tag("text", {"x": left, "y": under, "class": "axis"}, grid.across)]


def _cell(cell: Cell, x: float, y: float, side: int, titled: bool) -> Markup:
    box = {"x": x + 1, "y": y + 1, "width": side - 2, "height": side - 2, "rx": 2}
    title = [tag("title", {}, cell.note)] if titled else []
    rect = tag("rect", {"class": f"mark {cell.look}", **box}, *title)
    if not cell.mark:
        return rect
    return joined([rect, _mark(cell.mark, x, y, side)])


def _mark(mark: str, x: float, y: float, side: int) -> Markup:
    low, high = side * 0.3, side * 0.7
    if mark == "cross":
        path = (
            f"M{x + low:.1f} {y + low:.1f}L{x + high:.1f} {y + high:.1f}"
            f"M{x + high:.1f} {y + low:.1f}L{x + low:.1f} {y + high:.1f}"
        )
        return tag("path", {"class": "mark cross", "d": path})
    if mark == "ring":
        box = {"x": x + 0.5, "y": y + 0.5, "width": side - 1, "height": side - 1, "rx": 2}
        halo = tag("rect", {"class": "halo", **box})
        return joined([halo, tag("rect", {"class": "mark ring", **box})])
    if mark == "dot":
        middle = {"cx": x + side / 2, "cy": y + side / 2, "r": side * 0.2}
        return tag("circle", {"class": "mark dot", **middle})
    at = {"class": "glyph", "x": x + side / 2, "y": y + side / 2, "dy": "0.35em"}
    return tag("text", at, mark)


def legend(scale: Scale, unit: str, *marks: tuple[str, str]) -> Markup:
    """Return the key of a heat map's colours, and of its marks: (mark, meaning)."""
    swatches = (
        tag("rect", {"class": f"q{i}", "x": 14 * i, "width": 13, "height": 12, "rx": 2})
        for i in range(LEVELS)
    )
    ramp = tag(
        "svg",
        {"width": 14 * LEVELS, "height": 12, "role": "img", "aria-label": "colours, low to high"},
        joined(swatches),
    )
    ends = [f"{short(scale.low)} ", ramp, f" {short(scale.high)} {unit}".rstrip()]
    if scale.high <= scale.low:
        ends = [f"all {short(scale.low)} {unit}".rstrip()]
    return tag("p", {"class": "legend"}, tag("span", {}, *ends), *(key(*mark) for mark in marks))


def key(mark: str, meaning: str, look: str = "empty") -> Markup:
    """Return the explanation of a mark."""
    drawn = _cell(Cell(look, meaning, mark), 0, 0, 16, titled=False)
    svg = tag("svg", {"width": 16, "height": 16, "aria-hidden": "true"}, drawn)
    return tag("span", {}, svg, f" {meaning}")
