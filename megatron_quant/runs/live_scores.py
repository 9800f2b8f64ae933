"""Score on a live Megatron model: all ranks together, at any layout."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_quant.dist import Groups, sum_reduce, together
from megatron_quant.layers import ExpertScales, as_before
from megatron_quant.mcore.model import LiveModel, own_share, run_through
from megatron_quant.mcore.search import Candidates, LiveScorer, activations_alone, live_places
from megatron_quant.rendezvous import forwards
from megatron_quant.runs.auto_scores import Work, read_kept
from megatron_quant.runs.batches import input_rules
from megatron_quant.runs.phases import Phases
from megatron_quant.search import ScoreStore


@dataclass(frozen=True, kw_only=True)
class LiveSource:
    """The live model of a search.

    Attributes:
        load: Returns it; called if a batch has no scores. It is left as it was.
        vocab_size: Tokens that it knows.
    """

    load: Callable[[], LiveModel]
    vocab_size: int


def live_scores(work: Work, source: LiveSource, groups: Groups, phases: Phases) -> torch.Tensor:
    """Return the scores of all places' options, fp64, equal on all ranks. Collective.

    The first of ``groups``, the ranks that hold the model, keeps the scores.
    """
    store, count = work.opened(groups), len(work.batches)
    kept = torch.zeros(count, work.options + 1, dtype=torch.float64)  # the last column: lacking

    def read() -> None:
        if groups.rank == 0:
            kept[read_kept(store, range(count), kept[:, :-1]), -1] = 1

    together(groups, read)
    kept = sum_reduce(kept, groups)
    found, missing = kept[:, :-1], kept[:, -1].nonzero().flatten().tolist()
    if missing:
        model = source.load()
        with as_before(model.chunks), activations_alone(model.chunks), forwards():
            scorer = _scorer(work, model, source.vocab_size, phases)
            _score(work, scorer, found, missing, store, phases)
    return found.sum(0)


def _scorer(work: Work, model: LiveModel, vocab_size: int, phases: Phases) -> LiveScorer:
    """Measure the inputs, and fit the quantizers of all options. Collective."""
    plan, own = work.plan, own_share(work.batches)
    candidates = Candidates(
        problem=plan.problem,
        plans=plan.plans,
        expert_scales=ExpertScales(plan.target.expert_scales),
    )
    rules = replace(input_rules(work.calibration, None), act_percentile=100.0)
    with phases.bar("calibrate", len(own)) as progress:
        steps = [partial(run_through, model.chunks, own, progress)]
        places = live_places(model, candidates, steps, rules)
    return LiveScorer(
        model=model,
        places=places,
        vocab_size=vocab_size,
        method=work.auto.method,
        loss=work.loss,
    )


def _score(
    work: Work,
    scorer: LiveScorer,
    found: torch.Tensor,
    missing: list[int],
    store: ScoreStore | None,
    phases: Phases,
) -> None:
    """Fill the rows ``missing`` of ``found``, and keep each when it is done. Collective."""
    groups, step = scorer.model.groups, scorer.at_once

    def keep(few: list[int]) -> None:
        if store is not None and groups.rank == 0:
            for i in few:
                store.put(i, found[i])

    with phases.bar("score", len(missing)) as progress:
        for few in (missing[i : i + step] for i in range(0, len(missing), step)):
            found[few] = scorer([work.batches[i] for i in few])
            together(groups, partial(keep, few))
            progress(len(few))
