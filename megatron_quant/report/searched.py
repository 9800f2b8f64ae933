"""Sections on a search: which format where, the scores, and the frontier."""

from collections.abc import Sequence

from megatron_quant.report.facts import Place, Point, Search
from megatron_quant.report.grids import Cell, Grid, draw, key, legend
from megatron_quant.report.layers import Columns, columns_of
from megatron_quant.report.markup import Child, Markup, joined, tag
from megatron_quant.report.plots import Frame, diamond, dot, named, plot, square, steps
from megatron_quant.report.scales import Scale, plural, scale_of, short, whole
from megatron_quant.report.tables import Column, details, scrolling, table

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LOOKS = 6
_WIDE = 50.0  # ratio of scores from which their logarithm is drawn


def frontier(search: Search) -> Markup:
    """Return the score against bits: the best recipes, each candidate alone, and the choice."""
    alone = uniform(search)
    drawn = [*search.frontier, *alone.values(), Point(search.bits, search.score)]
    positive = [p.score for p in drawn if p.score > 0]
    log = bool(positive) and max(positive) > _WIDE * min(positive)
    frame = Frame(
        key="frontier",
        title="Score against bits a weight",
        about=_about(search),
        x=scale_of(p.bits for p in drawn),
        y=scale_of((p.score for p in drawn), log),
        across="bits a weight",
        width=520,
        height=300,
    )
    found = Point(search.bits, search.score)
    best = [p for p in search.frontier if p.score > 0 or not log]
    line = sorted({(p.bits, p.score) for p in (*best, found)})
    marks = [steps(frame, line)]
    marks += [dot(frame, p.bits, p.score, _point(p)) for p in best]
    for name, p in alone.items():
        marks.append(square(frame, p.bits, p.score, f"{name}: {_point(p)}"))
        marks.append(named(frame, p.bits, p.score, name))
    marks.append(diamond(frame, found.bits, found.score, f"found: {_point(found)}"))
    plotted = scrolling(frame.title, plot(frame, marks, "plot wide"))
    return joined([tag("p", {}, _about(search)), plotted, _key(), _points(search)])


def uniform(search: Search) -> dict[str, Point]:
    """Return bits and score of each candidate alone."""
    found = {}
    for name in search.candidates[:-1]:
        options = [
            next((o for o in place.options if name in o.candidates), place.chosen)
            for place in search.places
        ]
        counts = [p.weights * (p.share if search.cost == "active" else 1.0) for p in search.places]
        bits = sum(o.bits * n for o, n in zip(options, counts, strict=True)) / sum(counts)
        found[name] = Point(bits, sum(o.score for o in options))
    return found


def _about(search: Search) -> str:
    return (
        f"The recipe that was found has {search.bits:.3f} bits a weight and score "
        f"{short(search.score)}; at most {search.bound:g} bits were allowed. Less score is "
        f"better: it is the {search.unit}. At each point of the line, no recipe of these "
        "candidates has less within as many bits."
    )


def _key() -> Markup:
    marks = (
        ("M1 8h14", "line", "the best within rising bounds"),
        ("M4 4h8v8h-8z", "square", "a candidate everywhere"),
        ("M8 1l7 7-7 7-7-7z", "diamond", "found"),
    )
    view = {"width": 16, "height": 16, "aria-hidden": "true"}
    spans = (
        tag("span", {}, tag("svg", view, tag("path", {"class": look, "d": path})), f" {meaning}")
        for path, look, meaning in marks
    )
    return tag("p", {"class": "legend"}, *spans)


def _point(point: Point) -> str:
    return f"{point.bits:.3f} bits, score {short(point.score, 4)}"


def _points(search: Search) -> Markup:
    listed = [("best", p) for p in search.frontier]
    listed += [*uniform(search).items(), ("found", Point(search.bits, search.score))]
    rows: list[list[Child]] = [
        [name, f"{p.bits:.3f}", short(p.score, 4)]
        for name, p in sorted(listed, key=lambda pair: pair[1].bits)
    ]
    columns = (Column("Recipe"), Column("Bits a weight", True), Column("Score", True))
    return details("The points as numbers", table("Score against bits", columns, rows))


def choices(search: Search) -> Markup:
    """Return which format each place has."""
    formats = _formats(search.places)
    rows, columns = _rows(search.places), columns_of(p.layer for p in search.places)
    cells = {
        _at(p, rows, columns): Cell(
            _look(formats, p.chosen.format),
            f"{p.name}: {_named(p.chosen.format)}",
            _letter(formats, p.chosen.format),
        )
        for p in search.places
    }
    grid = Grid(
        key="choices",
        title="Format of each place",
        about="Rows are kinds of places, columns layers. A letter stands for a format.",
        rows=rows,
        columns=columns.labels,
        across="layer",
        cells=cells,
    )
    used = [p.chosen.format for p in search.places]
    meanings = (
        key(
            _letter(formats, f), f"{_named(f)}: {plural(used.count(f), 'place')}", _look(formats, f)
        )
        for f in formats
    )
    return joined([draw(grid), tag("p", {"class": "legend"}, *meanings), *_excluded(search)])


def _excluded(search: Search) -> list[Markup]:
    if not search.excluded:
        return []
    rows: list[list[Child]] = [[one.name, one.why] for one in search.excluded]
    said = f"{plural(len(rows), 'module')} that the search left as they are, and why"
    return [details(said, table(said, (Column("Module"), Column("Why")), rows))]


def _formats(places: Sequence[Place]) -> list[str]:
    """Return all treatments, by rising bits."""
    bits: dict[str, float] = {}
    for option in (option for place in places for option in place.options):
        bits[option.format] = max(bits.get(option.format, 0.0), option.bits)
    return sorted(bits, key=lambda name: (bits[name], name))


def _look(formats: Sequence[str], name: str) -> str:
    return f"k{formats.index(name) % _LOOKS}"


def _letter(formats: Sequence[str], name: str) -> str:
    return _LETTERS[formats.index(name) % len(_LETTERS)]


def _named(name: str) -> str:
    return "as it was" if name == "none" else name.replace("+", " \u00d7 ")


def _rows(places: Sequence[Place]) -> list[str]:
    return list(dict.fromkeys(p.family for p in places))


def _at(place: Place, rows: Sequence[str], columns: Columns) -> tuple[int, int]:
    return rows.index(place.family), columns.index(place.layer)


def scores(search: Search) -> Markup:
    """Return the scores of each format by place."""
    scale = scale_of((o.score for p in search.places for o in p.options), log=True)
    grids = [
        _score_grid(search, name, number, scale)
        for number, name in enumerate(_formats(search.places))
        if any(o.format == name and o.score for p in search.places for o in p.options)
    ]
    said = "What each format is expected to lose at each place. A dot marks what was chosen."
    keys = legend(scale, "", ("dot", "chosen"))
    return joined([tag("p", {}, said), *grids, keys, _score_table(search)])


def _score_grid(search: Search, name: str, number: int, scale: Scale) -> Markup:
    rows, columns = _rows(search.places), columns_of(p.layer for p in search.places)
    cells = {}
    for p in search.places:
        for o in (o for o in p.options if o.format == name):
            note = f"{p.name}, {_named(name)}: {short(o.score)}{', chosen' * o.chosen}"
            look = f"q{scale.level(o.score)}"
            cells[_at(p, rows, columns)] = Cell(look, note, "dot" if o.chosen else "")
    grid = Grid(
        key=f"scores{number}",
        title=f"Scores of {_named(name)}",
        about="Rows are kinds of places, columns layers. A stronger colour: more is lost.",
        rows=rows,
        columns=columns.labels,
        across="layer",
        cells=cells,
    )
    return joined([tag("h3", {}, _named(name)), draw(grid)])


def _score_table(search: Search) -> Markup:
    formats, rows = _formats(search.places), list[list[Child]]()
    for p in search.places:
        by_format = {o.format: short(o.score) for o in p.options}
        own = (by_format.get(name, "\u2013") for name in formats)
        rows.append([p.name, _named(p.chosen.format), whole(p.weights), *own])
    columns = (
        *(Column("Place"), Column("Chosen"), Column("Weights", True)),
        *(Column(_named(name), True) for name in formats),
    )
    return details("The scores as numbers", table("Scores by place", columns, rows))
