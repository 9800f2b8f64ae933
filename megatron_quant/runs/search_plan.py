"""Plan a search: what each candidate does to the model, the places, and what can be mixed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_quant.ckpt.dialects import Dialect, StorageSchemes
from megatron_quant.ckpt.plan import slots
from megatron_quant.engines import check_serving
from megatron_quant.errors import RecipeError
from megatron_quant.models import Param
from megatron_quant.recipes import QuantPlan
from megatron_quant.runs.job import Job
from megatron_quant.runs.settings import AutoQuantize, Serve
from megatron_quant.search import Model, Problem, check_bits, check_mixtures, find_problem

_REPLAYED = ("max", "mse", "four_over_six")


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model that is searched, and how the found recipe will be stored and served.

    kept: dtypes of the Hugging Face tensors that keep their own.
    """

    params: tuple[Param, ...]
    config: Mapping[str, Any]
    dialect: Dialect
    dtype: torch.dtype
    kept: Mapping[str, torch.dtype]
    serve: Serve
    expert_scales: str

    @classmethod
    def of(cls, job: Job, serve: Serve) -> "Target":
        """Return the model of a planned run, whose export goes to a directory."""
        assert job.dialect is not None
        return cls(
            params=job.params,
            config=job.hf_config,
            dialect=job.dialect,
            dtype=job.dtype,
            kept=job.kept,
            serve=serve,
            expert_scales=job.expert_scales,
        )


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search before weights are read: the model, each candidate's plan, and the places."""

    target: Target
    plans: Mapping[str, QuantPlan]
    problem: Problem


def plan_search(target: Target, plans: Mapping[str, QuantPlan], auto: AutoQuantize) -> SearchPlan:
    """Find the places, and refuse whatever does not fit before anything is scored.

    Args:
        target: The model and its destination.
        plans: Candidate -> its recipe, resolved for the model.
        auto: What was asked for.

    Raises:
        QuantError: For candidates that cannot be scored or mixed, and bits that cannot be met.
    """
    _check_candidates(plans, auto.context_length)
    problem = places_of(target, plans, auto.keep, auto.context_length)

    def check(plan: QuantPlan) -> None:
        dialect, serve = target.dialect, target.serve
        check_serving(plan, target.params, dialect.name, serve.engine, serve.tp, target.config)
        dialect.quantization_config(plan)

    check_mixtures(problem, slots(target.params), check)
    assert auto.bits is not None
    check_bits(problem, auto.bits, auto.cost)
    return SearchPlan(target=target, plans=plans, problem=problem)


def places_of(
    target: Target,
    plans: Mapping[str, QuantPlan],
    keep: tuple[str, ...],
    context: int | None = None,
) -> Problem:
    """Return the places of a model; raises as ``find_problem``."""
    kv_cache = next(iter(plans.values())).kv_cache
    return find_problem(_model(target, keep), plans, kv_cache, context)


def _model(target: Target, keep: tuple[str, ...]) -> Model:
    fp32 = {s.name: torch.float32 for p in target.params if p.fp32 or p.wide for s in p.sources}
    schemes = StorageSchemes(target.dialect, target.dtype, {**fp32, **target.kept})
    return Model(params=target.params, config=target.config, schemes=schemes, keep=keep)


def _check_candidates(plans: Mapping[str, QuantPlan], context: int | None) -> None:
    """Refuse candidates that scoring cannot replay, or whose recipes differ beyond the places."""
    for name, plan in plans.items():
        for d in plan.quantized:
            if d.algorithm not in _REPLAYED or d.searches_tensor:
                raise RecipeError(
                    f"--auto-quantize-formats {name}: the search does not replay algorithm "
                    f"{d.algorithm} of {d.rule}; take max, and --algorithm with the found recipe"
                )
    if context is None and len({plan.kv_cache for plan in plans.values()}) > 1:
        raise RecipeError(
            "--auto-quantize-formats: the candidates treat the KV cache differently; say how with "
            "--export-kv-cache-quant, or have the search choose: --auto-quantize-cost active "
            "--auto-quantize-context-length TOKENS"
        )
