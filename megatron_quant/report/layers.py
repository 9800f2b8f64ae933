"""Figures by layer, family and expert: what grids and panels are drawn of."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_quant.report.facts import Quantized, Weight

_LAYER = re.compile(r"\.(\d+)\.")
OUTSIDE = "other"
"""Column of weights that are in no layer."""


@dataclass(frozen=True)
class Columns:
    """The columns of a grid: the layers that occur, and one for weights outside of them."""

    layers: tuple[int | None, ...]

    @property
    def labels(self) -> list[str]:
        """Return the label of each column."""
        return [OUTSIDE if layer is None else str(layer) for layer in self.layers]

    def index(self, layer: int | None) -> int:
        """Return the column of a layer."""
        return self.layers.index(layer)


def columns_of(layers: Iterable[int | None]) -> Columns:
    """Return a column for each of ``layers``, in order, the one outside last."""
    found = set(layers)
    inside = sorted(layer for layer in found if layer is not None)
    return Columns((*inside, *((None,) if None in found else ())))


def worst(weights: Iterable[Weight]) -> Weight | None:
    """Return the weight that lost most; None where none was compared."""
    compared = (w for w in weights if w.format and w.error is not None)
    return max(compared, key=lambda w: w.error or 0.0, default=None)


def experts_of(facts: Quantized) -> dict[tuple[int, int], str]:
    """Return one logical weight of each expert, by layer and expert."""
    found: dict[tuple[int, int], str] = {}
    for w in facts.weights:
        if w.layer is not None and w.expert is not None:
            found.setdefault((w.layer, w.expert), w.slot)
    return found


def cold_experts(facts: Quantized) -> set[tuple[int, int]]:
    """Return layer and index of every expert that saw no token."""
    cold = set(facts.cold_experts)
    return {
        (w.layer, w.expert)
        for w in facts.weights
        if w.slot in cold and w.layer is not None and w.expert is not None
    }


def tokens_of(facts: Quantized) -> dict[tuple[int, int], int]:
    """Return the tokens that each expert was given, by layer and expert."""
    found: dict[tuple[int, int], int] = {}
    for w in facts.weights:
        if w.layer is not None and w.expert is not None and w.slot in facts.expert_tokens:
            at = w.layer, w.expert
            found[at] = max(found.get(at, 0), facts.expert_tokens[w.slot])
    return found


@dataclass(frozen=True)
class Range:
    """The smallest and the largest of several figures of one layer."""

    low: float
    high: float


def ranges(
    weights: Sequence[Weight], amaxes: Mapping[str, float]
) -> dict[str, dict[int | None, Range]]:
    """Return the ranges of ``amaxes`` by family and layer.

    Weights that share an input share a family, whose name lists them all.
    """
    members: dict[str, list[Weight]] = {}
    for w in weights:
        if w.slot in amaxes:
            members.setdefault(w.slot, []).append(w)
    found: dict[str, dict[int | None, Range]] = {}
    for slot, own in members.items():
        layers, value = found.setdefault(_family(own), {}), amaxes[slot]
        known = layers.get(own[0].layer, Range(value, value))
        layers[own[0].layer] = Range(min(known.low, value), max(known.high, value))
    return found


def cache_ranges(amaxes: Mapping[str, float]) -> dict[str, dict[int | None, Range]]:
    """Return the ranges of keys and values by kind and layer."""
    found: dict[str, dict[int | None, Range]] = {}
    for name, value in amaxes.items():
        at = _LAYER.search(name)
        kind = name[at.end() :] if at else name
        found.setdefault(f"KV cache: {kind}", {})[int(at[1]) if at else None] = Range(value, value)
    return found


def bits_of(facts: Quantized) -> float | None:
    """Return the bits that the export takes for each weight; None without an export."""
    stored = [w for w in facts.weights if w.after is not None]
    elements = sum(w.elements for w in stored)
    return 8 * sum(w.after or 0 for w in stored) / elements if elements else None


def _family(members: Sequence[Weight]) -> str:
    first, *rest = dict.fromkeys(w.family for w in members)
    stem = first.rpartition(".")[0]
    return "+".join((first, *(name.removeprefix(f"{stem}.") for name in rest)))
