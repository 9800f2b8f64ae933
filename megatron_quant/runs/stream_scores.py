"""Score by transformers' forward, a layer at a time: the ranks share the batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from megatron_quant.ckpt.plan import digest_of, slots
from megatron_quant.ckpt.read import CacheScales, open_stored
from megatron_quant.ckpt.write import Existing
from megatron_quant.dist import Groups, Meetings, gather, max_reduce, sum_reduce, together
from megatron_quant.errors import CalibrationError, ExportError, LostRankError, QuantError
from megatron_quant.evaluation import RoundedCache
from megatron_quant.formats import get_format, tensor_scale
from megatron_quant.models import Role
from megatron_quant.runs.auto_scores import Work, read_kept
from megatron_quant.runs.layer_walk import walked
from megatron_quant.runs.phases import Phases
from megatron_quant.search import (
    Backward,
    Change,
    Divergences,
    Fit,
    Progress,
    check_score,
)
from megatron_quant.streaming import (
    Borders,
    Seen,
    Skeleton,
    Walk,
    Workplace,
    input_keys,
    merge_amaxes,
    per_expert,
    shared,
    static_inputs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FOLDER = "walk"


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
        with work_folder(work, groups) as place:
            mine = [batches[i] for i in own]
            layers = measured_layers(work, source, mine, place, groups, phases)

            def score() -> None:
                if layers is not None:
                    found[own] = _SCORED[work.auto.method](work, layers, place, phases)
                if store is not None:
                    for i in missing:
                        store.put(i, found[i])

            together(groups, score)
    elif any(gather(_is_left(work), groups)):  # killed when all was scored
        with work_folder(work, groups):
            pass
    return sum_reduce(found, groups).sum(0)


def _is_left(work: Work) -> bool:
    return work.auto.checkpoint is not None and (work.auto.checkpoint / _FOLDER).exists()


@contextmanager
def work_folder(work: Work, groups: Groups) -> Iterator[Workplace]:
    """Hold the folder in which hidden states and scores are kept until all is scored.

    It lies in that of the scores, where the next search finds it; else it is a temporary one.
    """
    scales = [work.calibration.expert_share, work.calibration.cold_experts]
    made_of = digest_of([work.about, groups.size, scales])
    if work.auto.checkpoint is None:
        with TemporaryDirectory(prefix="megatron_quant_") as folder:
            place = Workplace(Path(folder), made_of, Existing.REFUSE, groups)
            try:
                yield place
            finally:
                place.leave()
        return
    kept = work.auto.checkpoint / _FOLDER
    place = Workplace(kept, made_of, Existing.RESUME, groups, anew=True)
    try:
        yield place
    except QuantError as error:
        if not isinstance(error, ExportError | LostRankError):
            place.remove()  # the next search would fail alike
        raise
    else:
        place.remove()
    finally:
        place.leave()


@dataclass(frozen=True)
class Layers:
    """A model that runs a layer at a time, and the places in it.

    Attributes:
        source: The checkpoint.
        borders: What a forward over this rank's batches left.
        fit: The places.
        cache_scales: Scales of keys and values by layer, where these were measured.
    """

    source: Path
    borders: Borders
    fit: Fit
    cache_scales: CacheScales

    @property
    def model(self) -> "PreTrainedModel":
        """Return the model."""
        return self.borders.skeleton.model

    def cache_change(self, kind: str) -> Change:
        """Return the change that a KV cache makes, named as recipes do."""
        scales = self.cache_scales if kind == "fp8" else None
        return Change({}, cache=partial(RoundedCache, self.model, scales))


def measured_layers(
    work: Work,
    source: Path,
    batches: Sequence[torch.Tensor],
    place: Workplace,
    groups: Groups,
    phases: Phases,
) -> Layers | None:
    """Run the batches forward, and measure the inputs of places. Collective.

    Args:
        work: What is scored.
        source: The checkpoint.
        batches: This rank's, int64 [B, S] each.
        place: Where hidden states are kept.
        groups: The ranks.
        phases: Where progress is shown.

    Returns:
        The layers; None for a rank without batches.

    Raises:
        CalibrationError: On every rank, where the model cannot be run layer by layer.
    """
    # Imported here: transformers takes seconds to load.
    from megatron_quant.evaluation import empty_model
    from megatron_quant.streaming import Headed, quiet

    target, plans = work.plan.target, work.plan.plans
    static = {p.name: p for q in plans.values() for p in static_inputs(q, target.params)}
    heads = [s.module for p in target.params if p.role is Role.OUTPUT for s in p.sources]

    def build() -> Skeleton:
        stored = open_stored(source)
        with quiet():
            model, weight = empty_model(stored, target.dtype, work.auto.head)
        headed = Headed(model, next(iter(heads), ""), weight)
        return Skeleton(stored, target.dtype, headed)

    def walk(skeleton: Skeleton, progress: Callable[[int], None], _: Meetings) -> Walk:
        _fit(work, skeleton.model, {}).check()
        return Walk(
            skeleton=skeleton,
            params=list(static.values()),
            batches=batches,
            place=place,
            on_batch=progress,
            caches=work.caches,
            expert_share=work.calibration.expert_share,
            keep=True,
        )

    def steps(skeleton: Skeleton) -> int:
        heads = any(p.role is Role.OUTPUT for p in static.values())
        return (len(skeleton.layers) + heads) * len(batches)

    seen, borders, reason = walked(build, walk, steps, groups, phases)
    if reason:
        raise _refused(source, reason)
    cold = work.calibration.cold_experts
    scales: dict[str, torch.Tensor] = {}
    for quant in plans.values():
        params = static_inputs(quant, target.params)
        scales |= merge_amaxes(quant, params, input_keys, seen.amax, cold, groups).scales
    cache = _cache_scales(work.caches, seen, groups)
    if borders is None:
        return None
    return Layers(source, borders, _fit(work, borders.skeleton.model, scales), cache)


def _cache_scales(caches: Mapping[int, Sequence[str]], seen: Seen, groups: Groups) -> CacheScales:
    """Return the scales of all ranks' keys and values, in one collective if there are any."""
    if not caches:
        return {}
    flat = torch.zeros(len(caches), 2)
    for row, names in zip(flat, caches.values(), strict=True):
        row.copy_(torch.stack([seen.amax.get(name, torch.zeros(())) for name in names]))
    scales = tensor_scale(max_reduce(flat, groups), get_format("fp8"))
    return {layer: (row[0], row[1]) for layer, row in zip(caches, scales, strict=True)}


def _fit(work: Work, model: "PreTrainedModel", scales: dict[str, torch.Tensor]) -> Fit:
    target = work.plan.target
    return Fit(
        model=model,
        problem=work.plan.problem,
        params=target.params,
        slots={slot.name: slot for slot in slots(target.params)},
        sharing=per_expert if target.expert_scales == "per_expert" else shared,
        input_amax=scales,
    )


@contextmanager
def walkable(source: Path) -> Iterator[None]:
    """Raise CalibrationError where a model turns out not to run layer by layer."""
    from megatron_quant.streaming import CannotWalk

    try:
        yield
    except CannotWalk as reason:
        raise _refused(source, str(reason)) from None


def _refused(source: Path, reason: str) -> CalibrationError:
    return CalibrationError(
        f"{source}: transformers' model cannot run layer by layer ({reason}), and so is not "
        "scored; a search without --stream scores Megatron's model"
    )


def _by_gradient(work: Work, layers: Layers, place: Workplace, phases: Phases) -> torch.Tensor:
    """Return the scores, fp64 [batches, options of all places]."""
    borders = layers.borders
    count = len(borders.batches)
    with phases.bar("score", (1 + borders.layers) * count) as progress, walkable(layers.source):
        return Backward(
            borders=borders,
            fit=layers.fit,
            loss=work.loss,
            files=place.gradients,
            cache_scales=layers.cache_scales,
            progress=Progress(place.scores, place.made_of, (count, work.options)),
            on_batch=progress,
        ).run()


def _by_divergence(work: Work, layers: Layers, place: Workplace, phases: Phases) -> torch.Tensor:
    """Return the scores, fp64 [batches, options of all places]."""
    problem = work.plan.problem
    changed = [
        (p, option, problem.columns[p.name].start + i)
        for p in problem.places
        for i, option in enumerate(p.options)
        if option.changes
    ]
    changes = [
        layers.cache_change(o.kv_cache) if p.cached else Change({p.name: o.rule})
        for p, o, _ in changed
    ]
    found = torch.zeros(len(layers.borders.batches), work.options, dtype=torch.float64)
    measured = divergences(layers, changes, place, phases)
    for (p, option, column), own in zip(changed, measured.T, strict=True):
        for score in own.tolist():
            check_score("kl_div", score, p.name, option.action)
        found[:, column] = own.clamp(min=0)
    return found


def divergences(
    layers: Layers, changes: Sequence[Change], place: Workplace, phases: Phases
) -> torch.Tensor:
    """Return the sums of the KL divergence of each change, fp64 [batches, changes]."""
    count = len(layers.borders.batches)
    work = Divergences(
        borders=layers.borders,
        fit=layers.fit,
        changes=changes,
        files=place.changed,
        progress=Progress(place.scores, place.made_of, (count, len(changes))),
        on_batch=lambda n: None,
    )
    with phases.bar("score", work.steps) as progress, walkable(layers.source):
        return replace(work, on_batch=progress).run()


_SCORED = {"gradient": _by_gradient, "kl_div": _by_divergence}
