"""What a recipe is: an ordered list of rules, each a set of patterns and what to do with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_quant.errors import FormatError, RecipeError
from megatron_quant.formats.spec import FORMATS, Format, get_format

SUPPORTED = (("fp8", None), ("fp8", "fp8"), ("nvfp4", None), ("nvfp4", "nvfp4"), ("int4", None))
"""Pairs (weights, inputs) that the layers run and the dialects write; None is weight-only."""

_SHOWN_PATTERNS = 3


@dataclass(frozen=True)
class Rule:
    """One line of a recipe: the weights that ``patterns`` match, and their formats.

    patterns: fnmatch patterns, case-sensitive, on Hugging Face or Megatron module names.
    weights: format of the weights; None excludes them from quantization.
    inputs: format of the activations that they multiply; None for weight-only.
    optional: whether the rule may claim nothing, as the catch-all lists of presets do.
    """

    patterns: tuple[str, ...]
    weights: Format | None = None
    inputs: Format | None = None
    optional: bool = False

    @property
    def action(self) -> str:
        """``exclude``, or the formats: ``nvfp4`` (weight-only), ``nvfp4+nvfp4`` (with inputs)."""
        if self.weights is None:
            return "exclude"
        return f"{self.weights.name}+{self.inputs.name}" if self.inputs else self.weights.name


@dataclass(frozen=True)
class Recipe:
    """Rules in order; the first one that matches a weight decides on it."""

    name: str
    rules: tuple[Rule, ...]
    description: str = ""

    def label(self, index: int) -> str:
        """How messages and the coverage audit call rule ``index`` (0-based)."""
        rule = self.rules[index]
        more = len(rule.patterns) - _SHOWN_PATTERNS
        shown = [*rule.patterns[:_SHOWN_PATTERNS], *([f"{more} more"] if more > 0 else [])]
        return f"rule {index + 1}: {rule.action} {', '.join(shown)}"


def weight_only(recipe: Recipe) -> Recipe:
    """The recipe without its input formats: nothing of it needs calibration data."""
    return replace(recipe, rules=tuple(replace(r, inputs=None) for r in recipe.rules))


def checked_rule(
    patterns: tuple[str, ...], weights: Format, inputs: Format | None, where: str
) -> Rule:
    """A rule that quantizes; RecipeError names ``where`` for a pair that is not SUPPORTED."""
    pair = (weights.name, inputs.name if inputs else None)
    if pair not in SUPPORTED:
        known = "; ".join(f"{w} with {i or 'no'} inputs" for w, i in SUPPORTED)
        raise RecipeError(f"{where}: {pair[0]} weights with {pair[1]} inputs; supported: {known}")
    return Rule(patterns, weights, inputs)


def checked_format(name: str, group_size: int | None, where: str) -> Format:
    """``get_format`` with RecipeError, which names ``where``, for what it does not know."""
    try:
        return get_format(name, group_size)
    except FormatError as e:
        raise RecipeError(f"{where}: {e}") from None


def parse_recipe(name: str, document: Any) -> Recipe:
    """The recipe that a YAML document describes.

    Raises RecipeError for an unknown key, a wrong type, no rules, a format that does not exist,
    and a pair of formats that nothing runs.
    """
    where = f"recipe {name!r}"
    top = _mapping(document, ("description", "rules"), where)
    description = top.get("description", "")
    if not isinstance(description, str):
        raise RecipeError(f"{where}: description must be a string, got {description!r}")
    rules = top.get("rules")
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"{where}: rules must be a list of at least one rule, got {rules!r}")
    parsed = (_parse_rule(r, f"{where}, rule {i}") for i, r in enumerate(rules, start=1))
    return Recipe(name, tuple(parsed), description.strip())


def _parse_rule(value: Any, where: str) -> Rule:
    rule = _mapping(value, ("quantize", "exclude", "weights", "inputs"), where)
    if ("quantize" in rule) == ("exclude" in rule):
        raise RecipeError(f"{where}: needs either quantize or exclude, a list of patterns")
    if "exclude" in rule:
        if len(rule) > 1:
            raise RecipeError(f"{where}: weights and inputs belong to quantize, not to exclude")
        return Rule(_parse_patterns(rule["exclude"], f"{where}, exclude"))
    if "weights" not in rule:
        raise RecipeError(f"{where}: weights is missing; known formats: {', '.join(FORMATS)}")
    patterns = _parse_patterns(rule["quantize"], f"{where}, quantize")
    weights = _parse_format(rule["weights"], f"{where}, weights")
    inputs = rule.get("inputs")
    return checked_rule(
        patterns,
        weights,
        None if inputs is None else _parse_format(inputs, f"{where}, inputs"),
        where,
    )


def _parse_patterns(value: Any, where: str) -> tuple[str, ...]:
    ok = isinstance(value, list) and value and all(isinstance(p, str) and p for p in value)
    if not ok:
        raise RecipeError(f"{where}: must be a list of at least one pattern, got {value!r}")
    return tuple(value)


def _parse_format(value: Any, where: str) -> Format:
    if isinstance(value, str):
        return checked_format(value, None, where)
    keys = _mapping(value, ("format", "group_size"), where)
    name, group_size = keys.get("format"), keys.get("group_size")
    if not isinstance(name, str):
        raise RecipeError(f"{where}: format must be one of {', '.join(FORMATS)}, got {name!r}")
    if group_size is not None and type(group_size) is not int:
        raise RecipeError(f"{where}: group_size must be an integer, got {group_size!r}")
    return checked_format(name, group_size, where)


def _mapping(value: Any, allowed: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: must be a mapping of {', '.join(allowed)}, got {value!r}")
    unknown = [str(key) for key in value if key not in allowed]
    if unknown:
        raise RecipeError(
            f"{where}: unknown key {', '.join(unknown)}; allowed: {', '.join(allowed)}"
        )
    return value
