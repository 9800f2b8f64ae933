"""Plots of numbers over numbers, as SVG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_quant.report.markup import Markup, joined, number, tag
from megatron_quant.report.scales import Scale, short

_LEFT, _TOP, _BOTTOM, _RIGHT = 46.0, 12.0, 30.0, 14.0


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The frame of a plot.

    Attributes:
        key: A word that no other drawing of the page has.
        title: What it shows.
        about: How to read it, for those who cannot see it.
        x: Scale of the horizontal axis.
        y: Scale of the vertical axis.
        across: What the horizontal axis is; empty to say nothing.
        width: Pixels at its natural size.
        height: Pixels at its natural size.
    """

    key: str
    title: str
    about: str
    x: Scale
    y: Scale
    across: str = ""
    width: int = 300
    height: int = 150

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixels of a point."""
        inner = self.width - _LEFT - _RIGHT
        tall = self.height - _TOP - _BOTTOM
        return _LEFT + inner * self.x.at(x), _TOP + tall * (1 - self.y.at(y))


def plot(frame: Frame, marks: Sequence[Markup], kind: str = "plot") -> Markup:
    """Return a plot with its axes; ``marks`` are drawn over them."""
    bottom = frame.height - _BOTTOM
    lines = [
        tag("path", {"class": "rule", "d": f"M{_LEFT} {_y(frame, v)}H{frame.width - _RIGHT}"})
        for v in frame.y.ticks()
    ]
    labels = [
        tag("text", {"class": "row", "x": _LEFT - 6, "y": _y(frame, v), "dy": "0.35em"}, short(v))
        for v in frame.y.ticks()
    ]
    labels += [
        tag("text", {"class": "col", "x": frame.at(v, 0)[0], "y": bottom + 13.0}, short(v))
        for v in frame.x.ticks()
    ]
    middle = (_LEFT + frame.width - _RIGHT) / 2
    labels.append(tag("text", {"class": "axis mid", "x": middle, "y": bottom + 26.0}, frame.across))
    head = [
        tag("title", {"id": f"{frame.key}-t"}, frame.title),
        tag("desc", {"id": f"{frame.key}-d"}, frame.about),
    ]
    view = {
        "class": kind,
        "viewBox": f"0 0 {frame.width} {frame.height}",
        "role": "img",
        "aria-labelledby": f"{frame.key}-t {frame.key}-d",
    }
    return tag("svg", view, joined([*head, *lines, *labels, *marks]))


def _y(frame: Frame, value: float) -> str:
    return number(frame.at(frame.x.low, value)[1])


def line(frame: Frame, points: Sequence[tuple[float, float]], look: str = "line") -> Markup:
    """Return a line through points."""
    return _path(frame, points, look, lambda x, y: f"L{number(x)} {number(y)}")


def steps(frame: Frame, points: Sequence[tuple[float, float]], look: str = "line") -> Markup:
    """Return a line that stays on a point's height until the next one."""
    return _path(frame, points, look, lambda x, y: f"H{number(x)}V{number(y)}")


def _path(
    frame: Frame,
    points: Sequence[tuple[float, float]],
    look: str,
    go: Callable[[float, float], str],
) -> Markup:
    (x, y), *rest = (frame.at(*point) for point in points)
    path = f"M{number(x)} {number(y)}" + "".join(go(*to) for to in rest)
    return tag("path", {"class": f"mark {look}", "d": path})


def dot(frame: Frame, x: float, y: float, note: str, look: str = "point") -> Markup:
    """Return a point that says what it is when it is pointed at."""
    px, py = frame.at(x, y)
    at = {"class": f"mark {look}", "cx": px, "cy": py, "r": 3.2}
    return tag("circle", at, tag("title", {}, note))


def square(frame: Frame, x: float, y: float, note: str) -> Markup:
    """Return a hollow square."""
    px, py = frame.at(x, y)
    at = {"class": "mark square", "x": px - 4, "y": py - 4, "width": 8, "height": 8}
    return tag("rect", at, tag("title", {}, note))


def diamond(frame: Frame, x: float, y: float, note: str) -> Markup:
    """Return a filled diamond."""
    px, py = frame.at(x, y)
    path = f"M{px:.1f} {py - 7:.1f}l7 7l-7 7l-7 -7z"
    return tag("path", {"class": "mark diamond", "d": path}, tag("title", {}, note))


def reach(frame: Frame, x: float, low: float, high: float, note: str) -> Markup:
    """Return a vertical line from ``low`` to ``high``, with a point at its upper end."""
    px, top = frame.at(x, high)
    bottom = frame.at(x, low)[1]
    stem = tag("path", {"class": "stem", "d": f"M{number(px)} {number(bottom)}V{number(top)}"})
    return joined([stem, dot(frame, x, high, note)])


def named(frame: Frame, x: float, y: float, name: str) -> Markup:
    """Return a name beside a point, on the side that has room."""
    px, py = frame.at(x, y)
    right = px < frame.width * 0.6
    at = {"class": "name" if right else "name end", "x": px + (9 if right else -9)}
    return tag("text", {**at, "y": py - 7 if py > _TOP + 12 else py + 15}, name)
