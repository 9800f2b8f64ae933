"""Make HTML and SVG of values. Text is always escaped; what is markup already has its own type."""

from collections.abc import Iterable, Mapping
from html import escape

from megatron_quant.documents import printable

_VOID = {"meta", "br", "link"}


class Markup(str):
    """Text that is markup, and so is not escaped again."""

    __slots__ = ()


Child = str | Markup
Attributes = Mapping[str, object]


def text(content: str) -> Markup:
    """Escape ``content``, and characters in it that move the cursor or reorder a line."""
    return Markup(escape(printable(content), quote=True))


def tag(name: str, attributes: Attributes | None = None, *children: Child) -> Markup:
    """Return an element. Plain strings among ``children`` are escaped.

    attributes: a value of None or False leaves it out, True gives it no value; numbers are written
    with at most two decimals.
    """
    given = "".join(_attribute(key, value) for key, value in (attributes or {}).items())
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Markup:
    """Return ``children`` one after another."""
    return Markup("".join(c if isinstance(c, Markup) else text(c) for c in children))


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return f" {key}"
    shown = number(value) if isinstance(value, float) else str(value)
    return f' {key}="{text(shown)}"'


def number(value: float) -> str:
    """Write a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
