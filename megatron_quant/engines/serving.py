"""Check, before anything is written, whether the engines that will read an export can serve it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_quant.engines.facts import (
    ANY,
    ENGINES,
    EVERYWHERE,
    FACTS,
    MXFP4,
    READS,
    SHARDED,
    WHOLE_GROUPS,
    Fact,
)
from megatron_quant.engines.family_obstacles import Obstacle, family_obstacles
from megatron_quant.engines.shapes import ragged_problem, shape_problem
from megatron_quant.errors import FormatError
from megatron_quant.models import Domain, Param, Role, engine_groups
from megatron_quant.recipes import DRAFT, Decision, QuantPlan


def check_serving(
    plan: QuantPlan,
    params: Sequence[Param],
    dialect: str,
    engine: str | None = None,
    tp: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Raise FormatError where ``plan`` in ``dialect`` cannot be served.

    Args:
        plan: Plan of the parameters or of their sources.
        params: The model's logical parameters (fused).
        dialect: Dialect of the export.
        engine: One of ``ENGINES``. None refuses an export that none of the dialect's readers can
            serve.
        tp: Tensor-parallel size of the server, 1 where only an engine is given. Without either no
            shapes are checked, but for rows that no reader of the dialect takes.
        config: Content of the model's config.json, which tells its family; None for none.

    Raises:
        FormatError: Names the first obstacle and the nearest that works.
    """
    if tp is not None and tp < 1:
        raise FormatError(f"--serve-tp is {tp}: give at least 1")
    if engine is not None and engine not in READS:
        raise FormatError(f"--serve-engine {engine!r} is not one of {', '.join(ENGINES)}")
    if engine is not None:
        engines, tp = [engine], tp or 1
    else:
        parallel = ENGINES if tp is None else SHARDED
        engines = [e for e in parallel if dialect in READS[e]]
    found = [obstacle(plan, params, dialect, e, tp, config) for e in engines]
    first = next(iter(found), None)
    if first is not None and all(o and (engine or not o.has_other_use) for o in found):
        who = f"{engine} cannot" if engine else "no engine can"
        raise FormatError(f"{who} serve this: {first.what}; take {first.instead}")


def obstacle(
    plan: QuantPlan,
    params: Sequence[Param],
    dialect: str,
    engine: str,
    tp: int | None,
    config: Mapping[str, Any] | None = None,
) -> Obstacle | None:
    """Return the first obstacle to serving ``plan`` with ``engine``; None where none is known.

    Args:
        plan: Plan of the parameters or of their sources.
        params: The model's logical parameters (fused).
        dialect: Dialect of the export.
        engine: One of ``ENGINES``.
        tp: Tensor-parallel size of the server; None looks at no cuts.
        config: Content of the model's config.json, which tells its family; None for none.
    """
    of_family = next(family_obstacles(config or {}, plan, dialect, engine), None)
    return of_family or next(_obstacles(plan, params, dialect, engine, tp), None)


def _obstacles(
    plan: QuantPlan, params: Sequence[Param], dialect: str, engine: str, tp: int | None
) -> Iterator[Obstacle]:
    if dialect not in READS[engine]:
        yield Obstacle(f"{engine} does not read {dialect}", f"--export-format {READS[engine][0]}")
        return
    # a bias has its weight's module, and no format
    params = [p for p in params if p.role in (Role.LINEAR, Role.DRAFT_LINEAR)]
    linear = ("", DRAFT)
    decisions = {n: d for d in plan.decisions if d.slot.fixed in linear for n in d.slot.sources}
    yield from _of_fused(params, decisions)
    found = [(p, d) for p in params if (d := decisions[p.sources[0].module]).quantized]
    sharded = engine in SHARDED
    whole = dialect in WHOLE_GROUPS if tp is None else not sharded
    if whole and (ragged := ragged_problem(found, dialect)) is not None:
        yield Obstacle(*ragged)
    yield from _of_mixtures(found, dialect, engine)
    yield from _of_formats(found, dialect, engine)
    if tp is None or not sharded or dialect == MXFP4:
        return
    chosen = [(p, d) for p, d in found if not d.carried]  # engines read the source's own shapes
    if (shape := shape_problem(chosen, dialect, tp)) is not None:
        yield Obstacle(*shape)


_Found = Sequence[tuple[Param, Decision]]


def _of_fused(params: Sequence[Param], decisions: dict[str, Decision]) -> Iterator[Obstacle]:
    """Require one format for the members of a fused linear."""
    for sources in engine_groups(params):
        members = [decisions[source.module] for source in sources]
        if len({(d.weights, d.inputs) for d in members}) > 1:
            names = " and ".join(source.module for source in sources)
            yield Obstacle(f"{names} are fused but differ in format", "one format for all of them")


def _of_mixtures(found: _Found, dialect: str, engine: str) -> Iterator[Obstacle]:
    mixed = len({(d.weights, d.inputs) for _, d in found}) > 1
    experts = any(p.domain is Domain.EXPERT for p, _ in found)
    if mixed and experts and (engine, dialect) == ("transformers", "compressed-tensors"):
        yield Obstacle(
            "mixed precision with quantized experts fails to load",
            "one format for all, or --serve-engine vllm",
        )


def _of_formats(found: _Found, dialect: str, engine: str) -> Iterator[Obstacle]:
    facts = [f for f in FACTS if engine in f.engines and dialect == f.dialect]
    for param, decision in found:
        for fact in facts:
            if _meets(fact, param, decision):
                yield Obstacle(f"{param.sources[0].module}: {fact.reason}", fact.instead)


def _meets(fact: Fact, param: Param, decision: Decision) -> bool:
    assert decision.weights is not None
    inputs = decision.inputs.name if decision.inputs else None
    there = fact.where == EVERYWHERE or param.domain is Domain.EXPERT
    return there and decision.weights.name in fact.weights and fact.inputs in (ANY, inputs)
