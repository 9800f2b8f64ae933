"""Parse a YAML document to a recipe: every key is known and of the right type, or an error."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_quant.errors import RecipeError
from megatron_quant.formats import CHANNEL, Format
from megatron_quant.recipes.schema import (
    SUPPORTED,
    Recipe,
    Rule,
    checked_alpha,
    checked_format,
    checked_kv_cache,
    checked_rule,
    checked_scales,
)

_TOP = ("description", "rules", "kv_cache")
_ALLOWING = ("allow_output", "allow_mtp")
_RULE = ("quantize", "exclude", "weights", "inputs", "algorithm", "damp", "alpha", *_ALLOWING)


def parse_recipe(name: str, document: Any) -> Recipe:
    """Return the recipe that a YAML document describes.

    Args:
        name: Name of the recipe, for messages.
        document: The parsed YAML.

    Raises:
        RecipeError: For an unknown key, a wrong type, no rules, a format or an algorithm that does
            not exist, and a pair of formats that nothing runs.
    """
    where = f"recipe {name!r}"
    top = _mapping(document, _TOP, where)
    description = top.get("description", "")
    if not isinstance(description, str):
        raise RecipeError(f"{where}: description must be a string, got {description!r}")
    rules = top.get("rules")
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"{where}: rules must be a list of at least one rule, got {rules!r}")
    parsed = tuple(_parse_rule(r, f"{where}, rule {i}") for i, r in enumerate(rules, start=1))
    kv_cache = checked_kv_cache(top.get("kv_cache") or "", where)
    return Recipe(name, parsed, description.strip(), kv_cache)


def _parse_rule(value: Any, where: str) -> Rule:
    rule = _mapping(value, _RULE, where)
    if ("quantize" in rule) == ("exclude" in rule):
        raise RecipeError(f"{where}: needs either quantize or exclude, a list of patterns")
    if "exclude" in rule:
        if len(rule) > 1:
            raise RecipeError(
                f"{where}: weights, inputs, algorithm, damp, alpha, allow_output and allow_mtp "
                "belong to quantize, not to exclude"
            )
        return Rule(patterns=_parse_patterns(rule["exclude"], f"{where}, exclude"))
    if "weights" not in rule:
        raise RecipeError(f"{where}: weights is missing; known formats: {', '.join(SUPPORTED)}")
    patterns = _parse_patterns(rule["quantize"], f"{where}, quantize")
    weights = _parse_format(rule["weights"], f"{where}, weights")
    inputs = None
    if rule.get("inputs") is not None:
        inputs = _parse_format(rule["inputs"], f"{where}, inputs")
    algorithm, damp, alpha = rule.get("algorithm", "max"), rule.get("damp"), rule.get("alpha")
    checked = checked_rule(patterns, weights, inputs, where, algorithm, damp)
    checked_alpha(alpha, algorithm, where)
    output, mtp = (_flag(rule, key, where) for key in _ALLOWING)
    return replace(checked, alpha=alpha, allow_output=output, allow_mtp=mtp)


def _flag(rule: Mapping[str, Any], key: str, where: str) -> bool:
    value = rule.get(key, False)
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: {key} must be true or false, got {value!r}")
    return value


def _parse_patterns(value: Any, where: str) -> tuple[str, ...]:
    ok = isinstance(value, list) and value and all(isinstance(p, str) and p for p in value)
    if not ok:
        raise RecipeError(f"{where}: must be a list of at least one pattern, got {value!r}")
    return tuple(value)


def _parse_format(value: Any, where: str) -> Format:
    if isinstance(value, str):
        return checked_format(value, None, where)
    keys = _mapping(value, ("format", "group_size", "scales"), where)
    name = keys.get("format")
    if not isinstance(name, str):
        raise RecipeError(f"{where}: format must be one of {', '.join(SUPPORTED)}, got {name!r}")
    fmt = checked_format(name, _parse_group_size(keys.get("group_size"), where), where)
    return checked_scales(fmt, keys["scales"], where) if "scales" in keys else fmt


def _parse_group_size(value: Any, where: str) -> int | None:
    if value == "channel":
        return CHANNEL
    if value is not None and type(value) is not int:
        raise RecipeError(f"{where}: group_size must be an integer or channel, got {value!r}")
    return value


def _mapping(value: Any, allowed: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: must be a mapping of {', '.join(allowed)}, got {value!r}")
    unknown = [str(key) for key in value if key not in allowed]
    if unknown:
        raise RecipeError(
            f"{where}: unknown key {', '.join(unknown)}; allowed: {', '.join(allowed)}"
        )
    return value
