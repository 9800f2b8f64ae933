"""Tables, with bars in their cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_quant.report.markup import Child, Markup, joined, tag

_BAR = 120  # pixels of the longest bar


@dataclass(frozen=True)
class Column:
    """A column: its heading, and whether it holds numbers, or text of several lines."""

    heading: str
    number: bool = False
    text: bool = False


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Child]]) -> Markup:
    """Return a caption and a table, which scrolls sideways where the screen is too narrow.

    The first cell of a row is its heading.
    """
    head = (tag("th", {"scope": "col", "class": _side(c)}, c.heading) for c in columns)
    body = (
        tag(
            "tr",
            {},
            tag("th", {"scope": "row", "class": _side(columns[0])}, row[0]),
            *(tag("td", {"class": _side(c)}, x) for c, x in zip(columns[1:], row[1:], strict=True)),
        )
        for row in rows
    )
    inner = tag(
        "table",
        {"aria-label": caption},
        tag("thead", {}, tag("tr", {}, *head)),
        tag("tbody", {}, *body),
    )
    return joined([tag("p", {"class": "caption"}, caption), scrolling(caption, inner)])


def _side(column: Column) -> str | None:
    return "num" if column.number else "text" if column.text else None


def scrolling(label: str, *children: Child) -> Markup:
    """Return a region that scrolls sideways, also by the keyboard."""
    return tag(
        "div", {"class": "scroll", "tabindex": 0, "role": "region", "aria-label": label}, *children
    )


def bar(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """Return a small horizontal bar.

    parts: class and length (0 to 1) of each bar, drawn over one another, longest first.
    label: what it shows, for those who cannot see it.
    """
    drawn = (
        tag("rect", {"class": f"mark {name}", "width": max(_BAR * length, 1.0), "height": 10})
        for name, length in parts
    )
    view = {"class": "bar", "viewBox": f"0 0 {_BAR} 10", "width": _BAR, "height": 10, "role": "img"}
    return tag("svg", {**view, "aria-label": label}, joined(drawn))


def details(summary: str, *children: Child) -> Markup:
    """Return a part that opens when it is asked for."""
    return tag("details", {}, tag("summary", {}, summary), *children)
