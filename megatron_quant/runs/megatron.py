"""Run ``quantize`` through Megatron: load, attach, calibrate, export, verify."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron.core import parallel_state as mpu

from megatron_quant.calib import (
    CalibrationReport,
)
from megatron_quant.ckpt.verify import Report
from megatron_quant.ckpt.write import Produce
from megatron_quant.dist import Groups, together
from megatron_quant.evaluation import Sums
from megatron_quant.folding import DOCUMENT
from megatron_quant.layers import ExpertScales
from megatron_quant.mcore.checkpoint import (
    Saved,
    restore,
)
from megatron_quant.mcore.live import (
    HFModel,
    Quantized,
    ResolvedRecipe,
    attach_plan,
    calibrate_quantized,
    producer,
)
from megatron_quant.mcore.model import (
    LiveModel,
    Reference,
    check_shares,
    empty_model,
    evaluate_model,
    fill_model,
    keep_scales,
    own_share,
    run_through,
)
from megatron_quant.models import text_config
from megatron_quant.rendezvous import forwards
from megatron_quant.runs.agree import check_options, check_plans, check_tokens, fetched
from megatron_quant.runs.batches import input_rules, keep_settings
from megatron_quant.runs.destination import (
    check_places,
    destination,
    existing_of,
    statistics_digest,
    verification,
    write_shown,
)
from megatron_quant.runs.found import Found
from megatron_quant.runs.inputs import Inputs, open_inputs, with_texts
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.saving import SavePlace, save_model
from megatron_quant.runs.settings import Write
from megatron_quant.runs.start import opened, original
from megatron_quant.streaming import PartSource, unscaled


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The findings of a run.

    kv_amax: for the keys and values of each attention, if the KV cache was calibrated.
    statistics: (quantizer's state name, shape, largest value) of this rank's quantizers.
    fake_quant: the quantized model's sums over the evaluation text; None without a text.
    verified: what verifying the export found; None without an export, or with ``--no-verify``.
    left_out: what the source has and the export lacks, one line each. seconds: of each phase.
    found: the search for the recipe; None if it was given.
    """

    job: Job
    calibration: CalibrationReport
    kv_amax: Mapping[str, float]
    statistics: list[tuple[str, tuple[int, ...], float]]
    fake_quant: Sums | None
    verified: Report | None
    left_out: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    found: Found | None = None


def quantize_run(options: QuantizeOptions, groups: Groups, phases: Phases) -> Outcome:
    """Quantize a Hugging Face checkpoint, or load a quantized Megatron one, and export it.

    Collective; every rank calls it. Raises the same QuantError on every rank, before anything is
    written or after removing what was; ``options.write.resume`` keeps it, to be continued.
    """
    check_options(options, groups)
    with phases.time("plan"):
        options = fetched(options, groups)
        together(groups, lambda: check_places(options))
        start = opened(options, groups)
        options, saved = start.options, start.saved
        checked = together(groups, lambda: open_inputs(options, groups.size, *start.model))
        check_plans(groups, checked.origin, checked.job.export)
        inputs = with_texts(checked, options, saved, groups)
        check_tokens(groups, [*inputs.batches, *inputs.windows])
    job = inputs.job
    model = _model(inputs, groups, phases)
    assert model.layout == job.layout, "the plan's owners are not where Megatron put the ranks"
    with phases.time("attach"):
        handle = _attach(inputs, model, saved)
        reference = Reference(handle.layers if inputs.windows else ())
    if saved is not None:
        with phases.time("load"):
            scales = ExpertScales(job.expert_scales)
            restore(model, handle.layers, handle.cached, job.quant, saved, scales)
    else:
        handle = _calibrate(options, inputs, handle, phases)
    calibration = handle.report or CalibrationReport(
        weight_amax={}, input_amax={}, scaled_amax={}, tokens={}, cold=()
    )
    fake_quant = _evaluate(inputs, handle, reference, phases) if inputs.windows else None
    amaxes = (calibration.weight_amax, calibration.input_amax, handle.kv_amax)
    found = (*amaxes, calibration.moments, handle.fold.document())
    digest = together(groups, lambda: statistics_digest(job, options, *found))
    if options.megatron_save_path is not None:
        with phases.time("save"):
            place = _save_place(options.megatron_save_path, options.write, inputs, digest)
            save_model(model, place, job.source, job.hf_config, groups)
    check = None
    if options.export_dir is not None:
        produced = producer(model, handle.layers, handle.cached, _carried(job))
        check = verification(options.write, options.export_dir, original(job), groups, phases)
        beside = inputs.companions
        assert beside is not None
        files = replace(beside, origin=replace(beside.origin, statistics=digest))
        if handle.fold.vectors:
            files = files.with_document(DOCUMENT, handle.fold.document())
        to = destination(options.write, options.export_dir, files, check)
        write_shown(job.exported, groups, produced, to, phases)
    report = check.report if check else None
    left_out = inputs.companions.left_out if inputs.companions else ()
    return Outcome(
        job=job,
        calibration=calibration,
        kv_amax=handle.kv_amax,
        statistics=statistics(model),
        fake_quant=fake_quant,
        verified=report,
        left_out=left_out,
    )


def _save_place(path: Path, write: Write, inputs: Inputs, statistics: str) -> SavePlace:
    """Describe the place; ``statistics`` is the digest of what calibration found."""
    origin, dtype = inputs.origin, str(inputs.job.dtype)
    made_of = {"recipe": origin.recipe, "source": origin.source, "dtype": dtype}
    return SavePlace(path, existing_of(write), {**made_of, "calibrated scales": statistics})


def _model(inputs: Inputs, groups: Groups, phases: Phases) -> LiveModel:
    """Build the model and load the Hugging Face checkpoint's weights, if there is one."""
    job = inputs.job
    assert job.architecture is not None, "a live model needs a table"
    model = empty_model(job.architecture, job.hf_config, job.layout, groups, job.dtype, job.mtp)
    if inputs.checkpoint is None:
        return model
    with phases.bar("load", len(model.local)) as progress:
        fill_model(model, inputs.checkpoint, progress)
    return model


def statistics(model: LiveModel) -> list[tuple[str, tuple[int, ...], float]]:
    """List every amax of this rank: state name (global layer), shape, largest value."""
    return [
        (model.global_name(number, name), tuple(amax.shape), float(amax.max()))
        for number, chunk in enumerate(model.chunks)
        for name, amax in chunk.named_buffers()
        if name.endswith("_amax")
    ]


def _attach(inputs: Inputs, model: LiveModel, saved: Saved | None) -> Quantized:
    job, kept = inputs.job, inputs.kept
    return attach_plan(
        model,
        ResolvedRecipe(
            hf=HFModel(job.hf_config, job.source),
            recipe=job.recipe,
            plan=job.quant,
            expert_scales=ExpertScales(job.expert_scales),
            source=inputs.origin.source,
        ),
        saved,
        keep=None if kept is None else partial(keep_scales, model=model, checkpoint=kept),
    )


def _calibrate(
    options: QuantizeOptions, inputs: Inputs, handle: Quantized, phases: Phases
) -> Quantized:
    if inputs.batches and inputs.job.quant.weighs_inputs:
        check_shares(inputs.batches)
    batches, how = own_share(inputs.batches), options.calibration
    runs = len(batches) * (1 + len(inputs.job.moments))
    with forwards(), phases.bar("calibrate", runs) as progress:
        # One call for all batches: a pipeline stays full only while they follow one another.
        steps = [partial(run_through, handle.model.chunks, batches, progress)]
        rules = input_rules(how, inputs.calibrated, len(batches))
        return calibrate_quantized(handle, steps, rules, keep_settings(how))


def _evaluate(inputs: Inputs, handle: Quantized, reference: Reference, phases: Phases) -> Sums:
    model = handle.model
    before = partial(reference.in_place, handle.cached)
    size = mpu.get_data_parallel_world_size()
    vocab_size = text_config(inputs.job.hf_config)["vocab_size"]
    count = -(-len(inputs.windows) // size)
    with forwards(), phases.bar("evaluate", count) as progress:
        return evaluate_model(
            model.chunks, before, inputs.windows, vocab_size, model.groups, progress
        )


def _carried(job: Job) -> Produce | None:
    """Make, from the source's files, what Megatron models lack: draft layers, vision towers."""
    if job.checkpoint is None:
        return None
    return unscaled(PartSource(job.checkpoint, job.dtype), job.quant)
