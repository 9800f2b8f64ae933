"""Sections on an evaluation: figures by position and by class of token."""

from collections.abc import Sequence

from megatron_quant.report.facts import Evaluation, Part
from megatron_quant.report.markup import Child, Markup, joined, tag
from megatron_quant.report.plots import Frame, dot, line, plot
from megatron_quant.report.scales import Scale, scale_of, short, whole
from megatron_quant.report.tables import Column, bar, details, table


def positions(found: Evaluation) -> Markup:
    """Return the figures by position in the window."""
    said = (
        f"Windows of {whole(found.seq_length)} tokens: how well a token is predicted with how many "
        "before it."
    )
    panels = [_panel("Perplexity", "ppl", found.positions, [p.perplexity for p in found.positions])]
    divergences = [p.kl for p in found.positions if p.kl is not None]
    if len(divergences) == len(found.positions):
        panels.append(_panel("KL divergence (nats)", "kl", found.positions, divergences))
    rows = [_row(part, []) for part in found.positions]
    numbers = details("The figures as numbers", table("By position", _columns("Position"), rows))
    return joined([tag("p", {}, said), tag("div", {"class": "panels"}, *panels), numbers])


def _panel(name: str, key: str, parts: Sequence[Part], values: Sequence[float]) -> Markup:
    low, high = min(values), max(values)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    frame = Frame(
        key=f"positions-{key}",
        title=f"{name} by position",
        about=f"From {short(values[0])} at a window's start to {short(values[-1])} at its end.",
        x=Scale(1, len(parts), counts=True),
        y=Scale(max(low - room, 0.0), high + room),
        across="part of the window",
        width=360,
        height=190,
    )
    points = [(float(i), value) for i, value in enumerate(values, 1)]
    marks = [line(frame, points)] if len(points) > 1 else []
    marks += [
        dot(frame, x, value, f"positions {part.label}: {short(value)}")
        for (x, value), part in zip(points, parts, strict=True)
    ]
    return tag("figure", {}, tag("figcaption", {}, name), plot(frame, marks))


def classes(found: Evaluation) -> Markup:
    """Return the figures by class of the predicted token."""
    measured = [p.kl if p.kl is not None else p.perplexity for p in found.classes]
    scale = Scale(0.0, scale_of(measured).high)
    what = "KL" if all(p.kl is not None for p in found.classes) else "perplexity"
    rows = [
        _row(part, [bar([("now", scale.at(value))], f"{what} {short(value)}")])
        for part, value in zip(found.classes, measured, strict=True)
    ]
    said = f"By the token that is predicted. The bars show the {what}."
    shown = table("By class of token", (*_columns("Class"), Column(what)), rows)
    return joined([tag("p", {}, said), shown])


def _columns(first: str) -> tuple[Column, ...]:
    numbers = (Column(name, True) for name in ("Tokens", "Perplexity", "KL"))
    return (Column(first), *numbers)


def _row(part: Part, more: Sequence[Child]) -> list[Child]:
    figures = (short(part.perplexity, 4), short(part.kl, 4))
    return [part.label, whole(part.tokens), *figures, *more]
