"""Merge table rows that differ only in the layer or the expert."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_LAYER = re.compile(r"(?<!\.experts)(?<=\.)\d+(?=\.)")


def collapse(
    items: Iterable[Item],
    name: Callable[[Item], str],
    kind: Callable[[Item], Hashable],
    layers: bool = True,
) -> Iterator[tuple[str, list[Item]]]:
    """Group items of one kind whose names differ only in layer and expert numbers.

    Yields one name and its items for each group, in the order of the groups' first items. A name
    is ``model.layers.{0..93}.mlp.experts.{0..127}.up_proj.weight``: each of the layers has each of
    the experts. Set ``layers`` to false to merge experts only.
    """
    by_layer: dict[tuple[str, Hashable], list[Item]] = {}
    for item in items:
        by_layer.setdefault((_EXPERT.sub("*", name(item)), kind(item)), []).append(item)
    rows: dict[tuple[str, Hashable, str], tuple[list[int], list[Item]]] = {}
    for (template, of_kind), members in by_layer.items():
        experts = spelled(int(m[0]) for i in members if (m := _EXPERT.search(name(i))))
        layer = _LAYER.search(template) if layers else None
        if layer:
            template = f"{template[: layer.start()]}#{template[layer.end() :]}"
        numbers, found = rows.setdefault((template, of_kind, experts), ([], []))
        numbers += [int(layer[0])] if layer else []
        found += members
    for (template, _, experts), (numbers, found) in rows.items():
        yield template.replace("#", spelled(numbers), 1).replace("*", experts, 1), found


def spelled(numbers: Iterable[int]) -> str:
    """Return ``7``, ``{0..3}`` or ``{0,2,5..9}``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
    return f"{{{text}}}" if "," in text or ".." in text else text
