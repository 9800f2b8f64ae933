"""Write a recipe as the document that it could have been read from, to travel with a model."""

from typing import Any

from megatron_quant.formats import CHANNEL, FORMATS, Format
from megatron_quant.recipes.plan import QuantPlan
from megatron_quant.recipes.schema import Recipe, Rule


def to_document(recipe: Recipe, plan: QuantPlan) -> dict[str, Any]:
    """Return a document from which ``parse_recipe`` makes the recipe again.

    Args:
        recipe: The recipe.
        plan: The recipe resolved for a model. Rules that decide on none of its weights, like the
            catch-all lists of presets, are left out.
    """
    used = {decision.rule for decision in plan.decisions}
    rules = [rule_document(r) for i, r in enumerate(recipe.rules) if recipe.label(i) in used]
    document: dict[str, Any] = {"rules": rules}
    if recipe.description:
        document["description"] = recipe.description
    if recipe.kv_cache:
        document["kv_cache"] = recipe.kv_cache
    return document


def rule_document(rule: Rule) -> dict[str, Any]:
    """Return a rule as ``parse_recipe`` reads it."""
    if rule.weights is None:
        return {"exclude": list(rule.patterns)}
    document: dict[str, Any] = {"quantize": list(rule.patterns), "weights": _format(rule.weights)}
    if rule.inputs is not None:
        document["inputs"] = _format(rule.inputs)
    if rule.algorithm != "max":
        document["algorithm"] = rule.algorithm
    if rule.damp is not None:
        document["damp"] = rule.damp
    if rule.alpha is not None:
        document["alpha"] = rule.alpha
    if rule.allow_output:
        document["allow_output"] = True
    if rule.allow_mtp:
        document["allow_mtp"] = True
    return document


def _format(fmt: Format) -> Any:
    if fmt == FORMATS[fmt.name]:
        return fmt.name
    size = "channel" if fmt.group_size == CHANNEL else fmt.group_size
    document = {"format": fmt.name, "group_size": size}
    return {**document, "scales": "signed"} if fmt.signed else document
