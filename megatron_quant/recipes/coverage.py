"""Audit the coverage: how many weights each rule, and each pattern of it, decided on."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_quant.recipes.match import Matcher
from megatron_quant.recipes.plan import Decision, QuantPlan
from megatron_quant.recipes.schema import Recipe


@dataclass(frozen=True)
class AuditRow:
    """One bucket of a plan.

    Attributes:
        rule: Label, equal to :attr:`Decision.rule`.
        action: ``exclude`` or the formats, in the words of :attr:`Rule.action`.
        weights: Number of weights in the bucket.
        patterns: (pattern, number of those weights that it matches) in the rule's order. A weight
            that two patterns match counts for both. Empty for weights that are never quantized.
    """

    rule: str
    action: str
    weights: int
    patterns: tuple[tuple[str, int], ...] = ()


def audit(plan: QuantPlan, recipe: Recipe) -> list[AuditRow]:
    """List one row per rule of ``recipe``, in order, then one per reason of never quantizing.

    The rows' ``weights`` add up to the number of decisions.

    Args:
        plan: Result of ``resolve(recipe, ...)``.
        recipe: The recipe that was resolved.
    """
    buckets: dict[str, list[Decision]] = {recipe.label(i): [] for i in range(len(recipe.rules))}
    for decision in plan.decisions:
        buckets.setdefault(decision.rule, []).append(decision)
    rules = list(zip(buckets.items(), recipe.rules, strict=False))
    rows = [
        AuditRow(label, rule.action, len(found), _counts(rule.patterns, found))
        for (label, found), rule in rules
    ]
    fixed = list(buckets.items())[len(rules) :]
    return rows + [AuditRow(label, "exclude", len(found)) for label, found in fixed]


def _counts(patterns: Sequence[str], decisions: Sequence[Decision]) -> tuple[tuple[str, int], ...]:
    matchers = [(p, Matcher([p])) for p in patterns]
    return tuple((p, sum(m.touches(d.slot) for d in decisions)) for p, m in matchers)
