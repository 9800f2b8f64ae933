"""Turn a live model into a quantized one: check, resolve, attach, calibrate."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from megatron_quant.calib import (
    CalibrationKeeper,
    CalibrationReport,
    InputRules,
    Merged,
    MomentSource,
    SquareSums,
    calibrate,
    calibrate_kv_cache,
    calibrate_weights,
    ranges_of,
    round_weights,
    run_rest,
    watch,
)
from megatron_quant.ckpt.plan import slots, source_digest
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CalibrationError, RecipeError
from megatron_quant.folding import Fold, find_places
from megatron_quant.layers import ExpertScales, QuantLayer
from megatron_quant.mcore.checkpoint import Saved, describe_model, describe_run, restore
from megatron_quant.mcore.live.folding import LiveFolding
from megatron_quant.mcore.live.forced import forced_experts
from megatron_quant.mcore.live.handle import (
    HFModel,
    Quantized,
    check_unquantized,
    quantized,
    read_hf_model,
)
from megatron_quant.mcore.model import LiveModel, attach_model, wrap_model
from megatron_quant.models import lookup_live
from megatron_quant.recipes import (
    QuantPlan,
    Recipe,
    difference,
    load_recipe,
    resolve,
)

_RULES = InputRules()


@dataclass(frozen=True)
class AttachSettings:
    """Options of attaching quantizers.

    saved: a Megatron checkpoint of a model quantized the same way; it gives weights and ranges.
    expert_scales: None for those of ``saved``; without ``saved``, for shared ones.
    check: raises for a plan that the caller cannot use.
    of_weights: whether the model has the weights of its Hugging Face checkpoint, so that their
        digest may stand in the export's manifest.
    """

    saved: Saved | None = None
    expert_scales: ExpertScales | None = None
    check: Callable[[QuantPlan], None] = lambda plan: None
    of_weights: bool = False


_DEFAULTS = AttachSettings()


def attach_recipe(
    model: nn.Module | Sequence[nn.Module],
    recipe: str | Recipe,
    hf_model: str | Path | Mapping[str, Any],
    groups: Groups,
    settings: AttachSettings = _DEFAULTS,
) -> Quantized:
    """Give a live model the quantizers that ``recipe`` asks for, in place. Collective.

    model: this rank's GPTModel or the list of its chunks; wrappers are looked through. hf_model:
    the model's Hugging Face directory, hub id or config; recipes use its names of weights.
    Raises QuantError, on every rank alike and before anything changes, if settings, names or
    shapes are not the config's, or the recipe does not fit.
    """
    together(groups, lambda: check_unquantized(model))
    hf, chosen = together(groups, lambda: (read_hf_model(hf_model), load_recipe(recipe)))
    architecture = together(groups, lambda: lookup_live(hf.config))
    live = wrap_model(model, architecture, hf.config, groups)
    saved = settings.saved
    plan = together(groups, lambda: _resolved(chosen, live, hf, saved, settings.check))
    given = together(
        groups, lambda: saved.source if saved else _digest(hf) if settings.of_weights else ""
    )
    scales = settings.expert_scales or ExpertScales(saved.expert_scales if saved else "shared")
    resolved = ResolvedRecipe(hf=hf, recipe=chosen, plan=plan, expert_scales=scales, source=given)
    attached = attach_plan(live, resolved, saved)
    if saved is None:
        return attached
    restore(live, attached.layers, attached.cached, plan, saved, scales)
    return replace(attached, stored=ranges_of(attached.layers)).remember()


def _digest(hf: HFModel) -> str:
    return source_digest(hf.weights) if hf.weights else ""


def _resolved(
    recipe: Recipe,
    live: LiveModel,
    hf: HFModel,
    saved: Saved | None,
    check: Callable[[QuantPlan], None],
) -> QuantPlan:
    described = slots(live.params)
    plan = resolve(recipe, described)
    check(plan)
    find_places(live.params, plan, hf.config)  # refuses a model without any
    if saved is None or saved.recipe is None:
        return plan
    if other := difference(plan, resolve(saved.recipe, described)):
        raise RecipeError(
            f"{saved.stored.path} was saved with recipe {saved.recipe.name!r}, which treats "
            f"{other} differently than {recipe.name!r}: give the saved recipe"
        )
    return plan


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A recipe that is resolved for a model.

    expert_scales: those that the model has in the end. source: digest of the Hugging Face
    checkpoint; empty if the weights are not its.
    """

    hf: HFModel
    recipe: Recipe
    plan: QuantPlan
    expert_scales: ExpertScales
    source: str = ""


def attach_plan(
    live: LiveModel,
    resolved: ResolvedRecipe,
    saved: Saved | None = None,
    keep: Callable[[Sequence[QuantLayer]], None] | None = None,
) -> Quantized:
    """Attach the quantizers of a resolved plan, and describe them. Collective.

    saved: the checkpoint that will be restored into them; they start with its expert scales.
    keep: gives the attached layers the scales of a source that is already quantized. Raises
    CoverageError, on every rank, for a layer that cannot carry the quantizer that the plan asks.
    """
    first = ExpertScales(saved.expert_scales) if saved else resolved.expert_scales

    def attached() -> Quantized:
        layers, cached = attach_model(live, resolved.plan, first)
        if keep is not None:
            keep(layers)
        handle = Quantized(
            model=live,
            hf=resolved.hf,
            recipe=resolved.recipe,
            plan=resolved.plan,
            expert_scales=resolved.expert_scales,
            layers=tuple(layers),
            cached=tuple(cached),
            source=resolved.source,
        )
        _describe(handle)
        return handle

    return together(live.groups, attached).remember()


def _describe(handle: Quantized) -> None:
    """Describe what is quantized, and how, in the model's own sharded state dict."""
    about = describe_run(handle.recipe, handle.plan, handle.expert_scales.value, handle.source)
    describe_model(handle.model, about, handle.layers)


@dataclass(frozen=True)
class KeepSettings:
    """The file for what calibration measures, and how much of it a rank holds at a time.

    file: where it is kept; None to forget it. hessians: whether second moments are kept too.
    memory: most bytes of second moments on a rank; None for any number.
    """

    file: Path | None = None
    hessians: bool = False
    memory: int | None = None


_FORGET = KeepSettings()


def calibrate_quantized(
    handle: Quantized,
    forwards: Iterable[Callable[[], object]] = (),
    rules: InputRules = _RULES,
    keep: KeepSettings = _FORGET,
) -> Quantized:
    """Fill all quantizers; return the handle with its report. Collective.

    Weights are changed where awq and smoothquant fold factors into them, and where gptq rounds.

    forwards: each runs calibration data through the model. All are run if the KV cache or any
    input has a static scale, and again for gptq, unless ``rules`` have what an earlier run
    measured. Raises CalibrationError, on every rank alike, and ExportError if the file of ``keep``
    cannot be written; weights may have been rounded by then.
    """
    live, plan = handle.model, handle.plan
    steps = tuple(_forced(handle, rules.expert_share, forward) for forward in forwards)
    with watch(handle.cached) as seen:
        report = calibrate(
            handle.layers,
            plan,
            live.groups,
            steps,
            replace(rules, token_replicas=live.layout.etp_size),
            _folding(handle),
        )
        if not plan.measured:
            run_rest(handle.layers, steps)
    found = calibrate_kv_cache(handle.cached, plan, live.groups, seen, rules.loaded)
    keeper = None
    if keep.file is not None:
        keeper = CalibrationKeeper(keep.file, plan, keep.hessians, live.groups)
    sums = SquareSums()

    def note(layer: QuantLayer, squares: Merged) -> None:
        sums.add(layer, squares)
        if keeper is not None:
            keeper.keep(layer, squares)

    def note_squares() -> None:
        for layer in handle.layers:
            if layer.name in report.squares:
                note(layer, report.squares[layer.name])

    source = MomentSource(
        forwards=steps,
        counted=rules.counted,
        limit=keep.memory,
        loaded=rules.loaded,
        keep=note,
        cached=handle.cached,
    )
    with _kept(report, found, keeper):
        together(live.groups, note_squares)
        round_weights(handle.layers, plan, live.groups, source)
    report = replace(report, moments=sums.merged(plan, live.groups), squares={})
    return replace(handle, report=report, kv_amax=found, fold=report.fold).remember()


def _folding(handle: Quantized) -> LiveFolding | None:
    """Return what folds factors into the model's weights; None where the recipe asks for none."""
    live, plan = handle.model, handle.plan
    places = find_places(live.params, plan, handle.hf.config).folded
    return LiveFolding(live, handle.layers, places, live.dtype) if places else None


def _forced(
    handle: Quantized, share: float | None, forward: Callable[[], object]
) -> Callable[[], object]:
    """Return ``forward`` with its experts given more tokens than the router gives them."""

    def run() -> None:
        with forced_experts(handle.model.chunks, handle.layers, share):
            forward()

    return run


@contextmanager
def _kept(
    report: CalibrationReport,
    kv_amax: Mapping[str, float],
    keeper: CalibrationKeeper | None,
) -> Iterator[None]:
    """Write the calibration file around the rounding, which adds to it. Collective."""
    if keeper is None:
        yield
        return
    try:
        keeper.start(report, kv_amax)
        yield
        keeper.finish()
    except BaseException:
        keeper.abandon()
        raise


def update(model: Quantized | nn.Module | Sequence[nn.Module]) -> Quantized:
    """Give the weights' quantizers the scales of the present weights. Collective.

    Call it after a quantized model was trained or given other weights. No forward runs: scales of
    inputs and of the KV cache stay. Whatever the recipe searches is searched again. Weights of gptq
    get searched scales and the nearest codes, with a warning: nothing of the data is left.

    model: the handle, or the model itself, wrapped or not. Returns the handle, which
    :func:`quantized` finds from now on. Raises CalibrationError, on every rank alike, for a weight
    that is not finite, and for a model that keeps the scales of a source that was quantized before.
    """
    handle = quantized(model)
    groups = handle.model.groups
    together(groups, lambda: _check_own_scales(handle.layers))
    rounded = sum(decision.rounds for decision in handle.plan.quantized)
    if rounded and groups.rank == 0:
        logging.getLogger(__name__).warning(
            "update runs no data: %d weights of algorithm gptq get searched scales and the nearest "
            "codes, also where they have not changed; quantize again to round them by their inputs",
            rounded,
        )
    found = calibrate_weights(handle.layers, handle.plan, groups)
    report = replace(handle.report, weight_amax=found) if handle.report else None
    stored = ranges_of(handle.layers) if handle.stored else ()
    # The weights are no longer those of the Hugging Face checkpoint: its digest is dropped, and so
    # is what was folded into them.
    updated = replace(handle, report=report, source="", stored=stored, fold=Fold())
    together(groups, lambda: _describe(updated))
    return updated.remember()


def _check_own_scales(layers: Sequence[QuantLayer]) -> None:
    for layer in layers:
        if layer.keeps_scales:
            raise CalibrationError(
                f"{layer.name} keeps the scales of its source, which new weights cannot change: "
                "quantize without --keep-scales"
            )
