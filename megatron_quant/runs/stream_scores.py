"""Score by transformers' forward: the ranks share the batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_quant.ckpt.plan import slots
from megatron_quant.dist import Groups, max_reduce, sum_reduce, together
from megatron_quant.formats import amax
from megatron_quant.runs.auto_scores import Work, read_kept
from megatron_quant.runs.phases import Phases
from megatron_quant.search import CACHE_SCORERS, SCORERS, place_weights
from megatron_quant.streaming import (
    input_keys,
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
    from megatron_quant.streaming import WeightInputAmax


def stream_scores(work: Work, source: Path, groups: Groups, phases: Phases) -> torch.Tensor:
    """Return the scores of all places' options, fp64, equal on all ranks. Collective.

    A batch's scores do not depend on who computes them, and they are added in the order of the
    batches.
    """
    store, batches = work.opened(groups), work.batches
    own = list(range(groups.rank, len(batches), groups.size))
    found = torch.zeros(len(batches), work.options, dtype=torch.float64)
    missing = together(groups, lambda: read_kept(store, own, found))
    if max_reduce(torch.tensor([len(missing)]), groups).item():
        model, places = loaded_places(work, source, [batches[i] for i in own], groups, phases)
        caches = [place for place in work.plan.problem.places if place.cached]

        def score() -> None:
            with phases.bar("score", len(missing)) as progress:
                for i in missing:
                    scorer = SCORERS[work.auto.method]
                    score_cache = CACHE_SCORERS[work.auto.method]
                    parts = [scorer(model, places, batches[i], work.loss)]
                    parts += [score_cache(model, p, batches[i], work.loss) for p in caches]
                    found[i] = torch.cat(parts)
                    if store is not None:
                        store.put(i, found[i])
                    progress(1)

        together(groups, score)
    return sum_reduce(found, groups).sum(0)


def loaded_places(
    work: Work,
    source: Path,
    batches: Sequence[torch.Tensor],
    groups: Groups,
    phases: Phases,
) -> "tuple[PreTrainedModel, list[PlaceWeights]]":
    """Load the model, find the places in it, and measure their inputs. Collective."""
    # Imported here: transformers takes seconds to load.
    from megatron_quant.evaluation import dense_model
    from megatron_quant.streaming import WeightInputAmax, forced_experts, quiet

    target, plans = work.plan.target, work.plan.plans
    of_slot = {slot.name: slot for slot in slots(target.params)}
    static = {p.name: p for q in plans.values() for p in static_inputs(q, target.params)}

    def load() -> "tuple[PreTrainedModel, WeightInputAmax]":
        with quiet():
            model = dense_model(source, target.dtype, work.auto.head)
        model.requires_grad_(False)
        return model, WeightInputAmax(watched(model, list(static.values())))

    with phases.time("load"):
        model, seen = together(groups, load)

    def measure() -> None:
        with (
            phases.bar("calibrate", len(batches)) as progress,
            torch.no_grad(),
            seen,
            forced_experts(model, work.calibration.expert_share, seen),
            _head_watched(model, [p.name for p in static.values() if not keys_of(p)], seen),
        ):
            for ids in batches if static else ():
                run_model(model, ids)
                progress(1)

    together(groups, measure)
    cold = work.calibration.cold_experts
    scales: dict[str, torch.Tensor] = {}
    for quant in plans.values():
        params = static_inputs(quant, target.params)
        scales |= merge_amaxes(quant, params, input_keys, seen.found.amax, cold, groups).scales
    sharing = per_expert if target.expert_scales == "per_expert" else shared
    problem = work.plan.problem
    return model, place_weights(model, problem, target.params, of_slot, sharing, scales)


@contextmanager
def _head_watched(
    model: "PreTrainedModel", names: Sequence[str], seen: "WeightInputAmax"
) -> Iterator[None]:
    """Measure the inputs of the output layer, whose slot is the only one of ``names``."""
    head = model.get_output_embeddings()
    if not names or head is None:
        yield
        return

    def measure(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        for name in names:
            found = amax(args[0])
            seen.found.amax[name] = torch.maximum(seen.found.amax.get(name, found), found)

    hook = head.register_forward_pre_hook(measure)
    try:
        yield
    finally:
        hook.remove()
