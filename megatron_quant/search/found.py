"""Write a choice of options as a recipe, which every command takes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_quant.documents import write_yaml
from megatron_quant.recipes import Recipe, Rule, rule_document
from megatron_quant.search.problem import Place, Problem


def to_recipe(problem: Problem, chosen: Sequence[int], name: str, description: str) -> Recipe:
    """Return the recipe that treats every place as chosen.

    Rules name modules in full, so that each decides on the places that it is for, whatever the
    order.

    Args:
        problem: The places.
        chosen: Option of each place.
        name: Name of the recipe, for messages.
        description: One line that says where it comes from.
    """
    patterns: dict[Rule, list[str]] = {}
    kv_cache = problem.kv_cache
    for place, index in zip(problem.places, chosen, strict=True):
        if place.cached:
            kv_cache = place.options[index].kv_cache
            continue
        rule = place.options[index].rule
        if rule.weights is None and place.output:
            continue  # it stays as it is unless a rule names it
        patterns.setdefault(rule, []).extend(_patterns(place))
    if problem.left:
        patterns.setdefault(Rule(patterns=()), []).extend(problem.left)
    quantized = sorted(patterns, key=lambda rule: rule.weights is None)  # exclusions last
    rules = tuple(replace(rule, patterns=tuple(patterns[rule])) for rule in quantized)
    return Recipe(name, rules, description, kv_cache)


def _patterns(place: Place) -> tuple[str, ...]:
    """Return patterns of a place's modules: one for a layer's experts."""
    stem = place.modules[0].partition(".experts.")[0] + ".experts."
    if place.stored > 1 and all(m.startswith(stem) for m in place.modules):
        return (f"{stem}*",)
    return place.modules


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe as the YAML file that ``--export-quant-cfg`` takes."""
    document: dict[str, object] = {"description": recipe.description}
    if recipe.kv_cache:
        document["kv_cache"] = recipe.kv_cache
    document["rules"] = [rule_document(rule) for rule in recipe.rules]
    write_yaml(path, document)
