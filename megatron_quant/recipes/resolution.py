"""Resolve a recipe for a model's slots: every weight lands in exactly one bucket, or an error."""

from collections.abc import Sequence

from megatron_quant.errors import CoverageError, RecipeError
from megatron_quant.recipes.match import Matcher
from megatron_quant.recipes.plan import DRAFT, OUTPUT, Decision, QuantPlan, Slot, left_alone
from megatron_quant.recipes.schema import Recipe, Rule

_SHOWN_WEIGHTS = 3


def resolve(recipe: Recipe, slots: Sequence[Slot]) -> QuantPlan:
    """Decide on every slot by the first rule that matches it.

    Fixed slots are excluded whatever the rules say; an exclude rule may name them. So may a rule
    with ``allow_output`` the output layer, which it then quantizes; and one with ``allow_mtp``
    quantizes linears of layers for speculation that no rule before it matches.

    Args:
        recipe: Rules in order.
        slots: Every logical weight of the model.

    Raises:
        CoverageError: For a slot that no rule claims, for one whose fused members a rule matches
            only in part, and for differing treatment of one layer's experts, or of other slots that
            engines fuse.
        RecipeError: For a rule that claims nothing, and for a recipe that quantizes nothing.
    """
    matchers = [Matcher(rule.patterns) for rule in recipe.rules]
    claims = [_claim_any(recipe, matchers, slot) for slot in slots]
    for index, rule in enumerate(recipe.rules):
        if index not in claims and not rule.optional:
            _check_idle(recipe, index, matchers[index], slots, claims)
    _check_unclaimed(recipe, slots, claims)
    _check_drafts(recipe, matchers, slots, claims)
    decisions = tuple(_decide(recipe, s, i) for s, i in zip(slots, claims, strict=True))
    _check_experts(decisions)
    _check_fused(decisions)
    plan = QuantPlan(recipe.name, decisions, recipe.kv_cache)
    if not plan.quantized:
        raise RecipeError(f"recipe {recipe.name!r} excludes every weight: add a quantize rule")
    return plan


def _claim_any(recipe: Recipe, matchers: Sequence[Matcher], slot: Slot) -> int | None:
    if not slot.fixed:
        return _claim(recipe, matchers, slot)
    if slot.fixed == OUTPUT:
        return _claim_output(recipe, matchers, slot)
    if slot.fixed != DRAFT or not recipe.allows_mtp:
        return None
    found = _claim(recipe, matchers, slot)
    return found if found is not None and recipe.rules[found].allow_mtp else None


def _claim(recipe: Recipe, matchers: Sequence[Matcher], slot: Slot) -> int | None:
    """Return the index of the first rule that matches ``slot``; it must match all its members."""
    assert slot.sources
    for index, matcher in enumerate(matchers):
        members = matcher.members(slot)
        if len(members) == len(slot.sources):
            return index
        if members:
            missing = ", ".join(s for s in slot.sources if s not in members)
            raise CoverageError(
                f"recipe {recipe.name!r}, {recipe.label(index)}: matches {', '.join(members)} but "
                f"not {missing}, which are fused with it: name all of them or none"
            )
    return None


def _claim_output(recipe: Recipe, matchers: Sequence[Matcher], slot: Slot) -> int | None:
    """Return the index of the first rule that names the output layer, if it may quantize it."""
    named = (i for i, m in enumerate(matchers) if m.names(slot))
    first = next((i for i in named if _may_take_output(recipe.rules[i])), None)
    return first if first is not None and recipe.rules[first].allow_output else None


def _may_take_output(rule: Rule) -> bool:
    return rule.allow_output or rule.weights is None


def _decide(recipe: Recipe, slot: Slot, index: int | None) -> Decision:
    if index is None:
        return left_alone(slot)
    rule = recipe.rules[index]
    return Decision(
        slot=slot,
        rule=recipe.label(index),
        weights=rule.weights,
        inputs=rule.inputs,
        algorithm=rule.algorithm,
        damp=rule.damp,
        alpha=rule.alpha,
    )


def _check_idle(
    recipe: Recipe,
    index: int,
    matcher: Matcher,
    slots: Sequence[Slot],
    claims: Sequence[int | None],
) -> None:
    """Raise for rule ``index``, which claims no slot, unless it excludes fixed slots."""
    fixed = sorted({s.fixed for s in slots if s.fixed and matcher.touches(s)})
    if fixed and recipe.rules[index].weights is None:
        return
    takers = {i for s, i in zip(slots, claims, strict=True) if i is not None and matcher.touches(s)}
    if takers:
        first = recipe.label(min(takers))
        reason = f"every weight it matches is claimed before it ({first}): reorder or remove it"
    elif fixed:
        reason = f"matches only weights that are never quantized ({', '.join(fixed)}): remove it"
        if DRAFT in fixed and not recipe.rules[index].allow_mtp:
            reason = "matches only layers for speculation: give it allow_mtp: true, or remove it"
    else:
        reason = "matches no weight of this model: correct the patterns or remove the rule"
    patterns = ", ".join(recipe.rules[index].patterns)
    raise RecipeError(f"recipe {recipe.name!r}, rule {index + 1} ({patterns}): {reason}")


def _check_unclaimed(recipe: Recipe, slots: Sequence[Slot], claims: Sequence[int | None]) -> None:
    free = [s for s, i in zip(slots, claims, strict=True) if i is None and not s.fixed]
    if free:
        shown = ", ".join(f"{s.name} ({', '.join(s.sources)})" for s in free[:_SHOWN_WEIGHTS])
        more = len(free) - _SHOWN_WEIGHTS
        raise CoverageError(
            f"recipe {recipe.name!r} says nothing about {shown}"
            f"{f' and {more} more' if more > 0 else ''}: match them in a quantize or exclude rule"
        )


def _check_drafts(
    recipe: Recipe,
    matchers: Sequence[Matcher],
    slots: Sequence[Slot],
    claims: Sequence[int | None],
) -> None:
    """Raise where layers for speculation are to be quantized and no linear of them is."""
    claimed = (s.fixed == DRAFT and i is not None for s, i in zip(slots, claims, strict=True))
    if not recipe.allows_mtp or any(claimed):
        return
    first = next((s for s in slots if s.fixed == DRAFT), None)
    if first is None:
        reason = (
            "the model has no layers for speculation here, or none whose names a table knows: "
            "leave out --quantize-mtp (allow_mtp)"
        )
    else:
        taker = next((i for i, m in enumerate(matchers) if m.touches(first)), None)
        by = "no rule matches them" if taker is None else f"{recipe.label(taker)} comes first"
        reason = f"allow_mtp takes no linear of layers for speculation ({first.sources[0]}): {by}"
    raise RecipeError(f"recipe {recipe.name!r}: {reason}")


def _check_experts(decisions: Sequence[Decision]) -> None:
    """Require one format for the experts of a layer: engines run them as one fused layer."""
    first: dict[str, Decision] = {}
    for d in decisions:
        layer, is_expert, _ = d.slot.name.partition(".experts.")
        if not is_expert or d.slot.fixed not in ("", DRAFT):
            continue
        other = first.setdefault(layer, d)
        if d.treatment != other.treatment:
            raise CoverageError(
                f"{other.slot.name} ({other.rule}) and {d.slot.name} ({d.rule}) are experts of one "
                "layer but differ: give all experts of a layer the same formats"
            )


def refuse_output(plan: QuantPlan) -> None:
    """Raise RecipeError where ``plan`` quantizes the output layer.

    Megatron's checkpoints keep no quantizers of it, and so neither does training.
    """
    for decision in plan.quantized:
        if decision.slot.fixed == OUTPUT:
            raise RecipeError(
                f"recipe {plan.recipe!r}, {decision.rule}: quantizes {decision.slot.sources[0]}, "
                "of which a Megatron checkpoint keeps no scales, and training neither: export at "
                "once, or leave the rule out"
            )


def _check_fused(decisions: Sequence[Decision]) -> None:
    """Require one format for weights that engines fuse though they are several slots."""
    first: dict[str, Decision] = {}
    for d in decisions:
        other = first.setdefault(d.slot.fused, d) if d.slot.fused else d
        if d.treatment != other.treatment:
            raise CoverageError(
                f"{other.slot.sources[0]} ({other.rule}) and {d.slot.sources[0]} ({d.rule}), which "
                "engines fuse, differ: give them the same formats or exclude both"
            )
