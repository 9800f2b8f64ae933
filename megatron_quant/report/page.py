"""One page of the facts: HTML without scripts, fonts, or anything else from a network."""

from collections.abc import Iterator

from megatron_quant.report import data, evaluated, families, searched, weights
from megatron_quant.report.facts import Facts, Quantized, Search
from megatron_quant.report.markup import Markup, tag
from megatron_quant.report.style import style
from megatron_quant.report.verdict import verdict

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TITLES = {
    "quantize": "Quantization",
    "search": "Search",
    "sensitivity": "Sensitivity",
    "eval": "Evaluation",
}

Section = tuple[str, str, Markup]
"""Anchor, heading and content."""


def page_of(facts: Facts) -> str:
    """Return the page of a run, as one HTML document."""
    title = f"{_TITLES[facts.command]} of {facts.model}"
    found = list(sections(facts))
    links = (tag("li", {}, tag("a", {"href": f"#{a}"}, name)) for a, name, _ in found)
    body = [
        tag("header", {}, *_head(facts)),
        verdict(facts),
        tag("nav", {"aria-label": "Sections"}, tag("ul", {}, *links)),
        tag("main", {}, *(_section(*section) for section in found)),
        tag("footer", {}, f"megatron_quant {facts.version}. The same facts are in the JSON file."),
    ]
    head = [
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        tag("meta", {"name": "color-scheme", "content": "light dark"}),
        tag("title", {}, title),
        tag("style", {}, Markup(style())),
    ]
    html = tag("html", {"lang": "en"}, tag("head", {}, *head), tag("body", {}, *body))
    return f"<!doctype html>\n{html}\n"


def _head(facts: Facts) -> Iterator[Markup]:
    yield tag("p", {"class": "kind"}, _TITLES[facts.command])
    yield tag("h1", {}, facts.model)
    if facts.quantized is not None:
        q = facts.quantized
        ranks = f"{q.ranks} rank" + "s" * (q.ranks != 1)
        about = (q.recipe, q.dialect and f"dialect {q.dialect}", q.dtype, ranks)
        yield tag("p", {"class": "about"}, " · ".join(filter(None, about)))
        if q.description:
            yield tag("p", {"class": "about"}, q.description)
    if facts.evaluation is not None:
        against = f", against {facts.evaluation.against}" if facts.evaluation.against else ""
        yield tag("p", {"class": "about"}, f"on {facts.evaluation.text}{against}")


def _section(anchor: str, heading: str, content: Markup) -> Markup:
    return tag("section", {"id": anchor}, tag("h2", {}, heading), content)


def sections(facts: Facts) -> Iterator[Section]:
    """Yield the sections that the facts have something for."""
    if facts.quantized is not None:
        yield from _of_quantized(facts.quantized)
    if facts.search is not None:
        yield from _of_search(facts.search)
    if facts.sensitivity is not None:
        yield "families", "Families of weights", families.losses(facts.sensitivity)
    if facts.evaluation is not None:
        yield "positions", "By position", evaluated.positions(facts.evaluation)
        yield "classes", "By class of token", evaluated.classes(facts.evaluation)
    if facts.quantized is not None:
        yield "coverage", "Coverage and exclusions", weights.coverage(facts.quantized)
        yield "times", "Times", data.times(facts.quantized)


def _of_quantized(facts: Quantized) -> Iterator[Section]:
    yield "sizes", "Sizes", weights.sizes(facts)
    if (errors := weights.errors(facts)) is not None:
        yield "errors", "Relative errors", errors
    if (experts := data.experts(facts)) is not None:
        yield "experts", "Tokens of experts", experts
    if (inputs := data.inputs(facts)) is not None:
        yield "inputs", "Ranges of inputs", inputs


def _of_search(search: Search) -> Iterator[Section]:
    yield "frontier", "Score against bits", searched.frontier(search)
    yield "choices", "Which format where", searched.choices(search)
    yield "scores", "Scores", searched.scores(search)
