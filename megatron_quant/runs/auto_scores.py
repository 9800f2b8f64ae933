"""Score the candidates of a search batch by batch, on one rank or several, and keep the scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from megatron_quant.alike import ids_once_a_host
from megatron_quant.ckpt.plan import digest_of_parts, slots, source_digest
from megatron_quant.dist import Groups, max_reduce, sum_reduce, together
from megatron_quant.models import positive, text_config
from megatron_quant.recipes import QuantPlan
from megatron_quant.runs.agree import check_tokens
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.search import SCORERS, Problem, ScoreStore, place_weights
from megatron_quant.streaming import (
    keys_of,
    merge_amaxes,
    per_expert,
    run_model,
    shared,
    static_inputs,
    watched,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron_quant.search import PlaceWeights

_DIGITS = 12


@dataclass(frozen=True)
class SearchPlan:
    """A search before weights are read: the first candidate's job, all plans, and the places."""

    job: Job
    plans: Mapping[str, QuantPlan]
    problem: Problem


def scored(
    options: QuantizeOptions, plan: SearchPlan, groups: Groups, phases: Phases
) -> torch.Tensor:
    """Return the scores of all places' options, fp64, equal on all ranks. Collective.

    The ranks share the batches. A batch's scores do not depend on who computes them, and they are
    added in the order of the batches.
    """
    batches = _batches(options, plan, groups, phases)
    directory = options.auto.checkpoint
    store = None if directory is None else ScoreStore(directory)

    def begin() -> None:
        if store is not None and groups.rank == 0:
            store.begin(_about(options, plan, batches), len(batches), plan.problem)

    together(groups, begin)
    own = list(range(groups.rank, len(batches), groups.size))
    count = sum(len(p.options) for p in plan.problem.places)
    found = torch.zeros(len(batches), count, dtype=torch.float64)
    missing = together(groups, lambda: _read(store, own, found))
    if max_reduce(torch.tensor([len(missing)]), groups).item():
        model, places = _model(options, plan, [batches[i] for i in own], groups, phases)

        def score() -> None:
            with phases.bar("score", len(missing)) as progress:
                for i in missing:
                    found[i] = SCORERS[options.auto.method](model, places, batches[i])
                    if store is not None:
                        store.put(i, found[i])
                    progress(1)

        together(groups, score)
    return sum_reduce(found, groups).sum(0)


def _batches(
    options: QuantizeOptions, plan: SearchPlan, groups: Groups, phases: Phases
) -> list[torch.Tensor]:
    # Imported here: transformers takes seconds to load.
    from megatron_quant.runs.batches import calibration_batches

    job, data = plan.job, replace(options.calibration, size=options.auto.score_size)

    def read() -> list[torch.Tensor]:
        vocabulary = positive(text_config(job.hf_config), "vocab_size")
        return calibration_batches(data, job.source, vocabulary)

    with phases.time("load text"):
        batches = ids_once_a_host(groups, read)
        check_tokens(groups, batches)
    return batches


def _about(
    options: QuantizeOptions, plan: SearchPlan, batches: Sequence[torch.Tensor]
) -> dict[str, str]:
    """Return what scores depend on, beside the places."""
    text = digest_of_parts(ids.contiguous().numpy().tobytes() for ids in batches)
    return {
        "method": options.auto.method,
        "model": source_digest(plan.job.source)[:_DIGITS],
        "text": text[:_DIGITS],
        "dtype": options.dtype,
        "expert scales": plan.job.expert_scales,
    }


def _read(store: ScoreStore | None, own: Sequence[int], found: torch.Tensor) -> list[int]:
    """Read the scores that are kept into ``found``; return the batches that have none."""
    missing = []
    for i in own:
        if store is not None and store.has(i):
            found[i] = store.get(i, found.shape[1])
        else:
            missing.append(i)
    return missing


def _model(
    options: QuantizeOptions,
    plan: SearchPlan,
    batches: Sequence[torch.Tensor],
    groups: Groups,
    phases: Phases,
) -> "tuple[PreTrainedModel, list[PlaceWeights]]":
    """Load the model, find the places in it, and measure their inputs. Collective."""
    from megatron_quant.evaluation import dense_model
    from megatron_quant.streaming import WeightInputAmax, forced_experts, quiet

    job = plan.job
    of_slot = {slot.name: slot for slot in slots(job.params)}
    static = {p.name: p for q in plan.plans.values() for p in static_inputs(q, job.params)}

    def load() -> "tuple[PreTrainedModel, WeightInputAmax]":
        with quiet():
            model = dense_model(job.source, job.dtype)
        model.requires_grad_(False)
        return model, WeightInputAmax(watched(model, list(static.values())))

    with phases.time("load"):
        model, seen = together(groups, load)

    def measure() -> None:
        with (
            phases.bar("calibrate", len(batches)) as progress,
            torch.no_grad(),
            seen,
            forced_experts(model, options.calibration.expert_share, seen),
        ):
            for ids in batches if static else ():
                run_model(model, ids)
                progress(1)

    together(groups, measure)
    cold = options.calibration.cold_experts
    scales: dict[str, torch.Tensor] = {}
    for quant in plan.plans.values():
        params = static_inputs(quant, job.params)
        scales |= merge_amaxes(quant, params, keys_of, seen.found.amax, cold, groups).scales
    sharing = per_expert if job.expert_scales == "per_expert" else shared
    return model, place_weights(model, plan.problem, job.params, of_slot, sharing, scales)
