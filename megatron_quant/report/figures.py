"""Facts as flat parameters, metrics and series, as trackers of experiments take them."""

import re
from collections.abc import Iterator, Mapping
from math import isfinite

from megatron_quant.report.facts import Evaluation, Facts, Quality, Quantized, Search
from megatron_quant.report.layers import (
    bits_of,
    cache_ranges,
    cold_experts,
    experts_of,
    ranges,
    tokens_of,
    worst,
)

_UNNAMED = re.compile(r"[^\w./ -]")


def params(facts: Facts) -> dict[str, str]:
    """Return the settings of a run."""
    found: dict[str, object] = {"command": facts.command, "model": facts.model}
    found["megatron_quant"] = facts.version
    if (q := facts.quantized) is not None:
        found |= {"recipe": q.recipe, "dialect": q.dialect, "dtype": q.dtype, "ranks": q.ranks}
    if (s := facts.search) is not None:
        found |= {"search.method": s.method, "search.cost": s.cost, "search.bound": s.bound}
        found["search.candidates"] = ", ".join(s.candidates)
    if (e := facts.evaluation) is not None:
        found |= {"text": e.text, "against": e.against, "seq_length": e.seq_length}
    return {name: str(value) for name, value in found.items() if value != ""}


def metrics(facts: Facts) -> dict[str, float]:
    """Return the figures of a run, one number each."""
    found: list[tuple[str, float]] = []
    if facts.quantized is not None:
        found += _of_quantized(facts.quantized)
    if facts.search is not None:
        found += _of_search(facts.search)
    if facts.sensitivity is not None:
        rows = facts.sensitivity.rows
        found += [(f"families/{row.family}/{row.format}/kl", row.kl) for row in rows]
    if facts.evaluation is not None:
        found += _of_evaluation(facts.evaluation)
    return {name_of(name): float(value) for name, value in found if isfinite(value)}


def series(facts: Facts) -> dict[str, dict[int, float]]:
    """Return name -> step -> value. The step is a layer, or the number of a part of a window."""
    found: dict[str, dict[int, float]] = {}
    if facts.quantized is not None:
        for w in facts.quantized.weights:
            if w.format and w.error is not None and w.layer is not None:
                own = found.setdefault(f"layers/error/{w.family}", {})
                own[w.layer] = max(own.get(w.layer, 0.0), w.error)
        every = ranges(facts.quantized.weights, facts.quantized.input_amax)
        every |= cache_ranges(facts.quantized.kv_amax)
        for family, layers in every.items():
            inside = {layer: r.high for layer, r in layers.items() if layer is not None}
            found |= {f"layers/input_amax/{family}": inside} if inside else {}
    if facts.evaluation is not None:
        parts = list(enumerate(facts.evaluation.positions))
        found["positions/perplexity"] = {i: p.perplexity for i, p in parts}
        if kls := {i: p.kl for i, p in parts if p.kl is not None}:
            found["positions/kl"] = kls
    return {name_of(name): _finite(values) for name, values in found.items()}


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if isfinite(value)}


def name_of(name: str) -> str:
    """Return a name that every tracker takes: letters, digits and ``_./ -``."""
    return _UNNAMED.sub("_", name)


def _of_quantized(facts: Quantized) -> Iterator[tuple[str, float]]:
    if facts.bytes_before and facts.bytes_after:
        yield "bytes/before", facts.bytes_before
        yield "bytes/after", facts.bytes_after
    if (bits := bits_of(facts)) is not None:
        yield "bits_a_weight", bits
    if (found := worst(facts.weights)) is not None:
        yield "error/worst", found.error or 0.0
    if experts_of(facts) and (facts.expert_tokens or facts.input_amax):
        yield "experts/cold", len(cold_experts(facts))
    if tokens := tokens_of(facts):
        yield "experts/least_tokens", min(tokens.values())
        yield "experts/most_tokens", max(tokens.values())
    if facts.fake_quant is not None:
        yield from _quality("fake_quant/", facts.fake_quant)
    for phase, taken in facts.seconds.items():
        yield f"seconds/{phase}", taken


def _quality(prefix: str, quality: Quality) -> Iterator[tuple[str, float]]:
    yield f"{prefix}perplexity", quality.perplexity
    if quality.kl is not None:
        yield f"{prefix}kl", quality.kl


def _of_search(facts: Search) -> Iterator[tuple[str, float]]:
    yield "search/bits", facts.bits
    yield "search/score", facts.score


def _of_evaluation(facts: Evaluation) -> Iterator[tuple[str, float]]:
    yield from _quality("", facts.quality)
    for part in facts.classes:
        yield from _quality(f"classes/{part.label}/", Quality(part.perplexity, part.kl, 0))
