"""The run itself: load, attach, calibrate, export, verify. Every rank calls :func:`quantize`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu

from megatron_quant.calib import (
    CalibrationReport,
    ColdExperts,
    calibrate,
    calibrate_kv_cache,
    run_rest,
    shard,
    watch,
)
from megatron_quant.ckpt.plan import RankPart
from megatron_quant.ckpt.verify import Report
from megatron_quant.ckpt.write import Produce, Produced, export, produce, produce_cache_scale
from megatron_quant.dist import Groups, together
from megatron_quant.evaluation import Sums
from megatron_quant.layers import CachedTensor, ExpertScales, QuantLayer
from megatron_quant.mcore.checkpoint import Saved, describe_model, describe_run, open_saved, restore
from megatron_quant.mcore.model import (
    LiveModel,
    attach_model,
    empty_model,
    evaluate_model,
    keep_scales,
    load_model,
    local_params,
    run_schedule,
)
from megatron_quant.models import Role
from megatron_quant.runs.agree import check_options, check_plans, check_tokens, fetched
from megatron_quant.runs.destination import Verification, statistics_digest
from megatron_quant.runs.inputs import Inputs, open_inputs
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.save import save_model
from megatron_quant.streaming import PartSource, Producer


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run found.

    kv_amax: of the keys and values of each attention, where the KV cache was calibrated.
    statistics: (quantizer's state name, shape, largest value) of this rank's quantizers.
    fake_quant: sums over the evaluation text, of the quantized model in Megatron; None without one.
    verified: what verifying the export found, on rank 0; None on the others.
    left_out: what the source has and the export has not, one line each.
    """

    job: Job
    calibration: CalibrationReport
    kv_amax: Mapping[str, float]
    statistics: list[tuple[str, tuple[int, ...], float]]
    fake_quant: Sums | None
    verified: Report | None
    left_out: tuple[str, ...] = ()


def quantize(options: QuantizeOptions, groups: Groups, phases: Phases) -> Outcome:
    """Quantize a Hugging Face checkpoint into ``options.export_dir``, or load one that is.

    Collective. Raises a QuantError, the same on every rank, before anything is written or with
    what was written removed (with ``options.resume``: kept, to be continued).
    """
    check_options(options, groups)
    with phases.time("plan"):
        options = fetched(options, groups)
        saved = None
        if options.megatron_load_path is not None:
            saved = open_saved(options.megatron_load_path, groups)
        inputs = together(groups, lambda: open_inputs(options, groups.size, saved))
        check_plans(groups, inputs.origin, inputs.job.export)
        check_tokens(groups, [*inputs.batches, *inputs.windows])
    job = inputs.job
    model = _model(inputs, groups, phases)
    assert model.layout == job.layout, "the plan's owners are not where Megatron put the ranks"
    with phases.time("attach"):
        scales = saved.expert_scales if saved else job.expert_scales
        layers, cached = together(groups, lambda: _attach(inputs, model, ExpertScales(scales)))
    if saved is not None:
        calibration, kv_amax = _restore(job, model, layers, cached, saved, phases)
    else:
        calibration, kv_amax = _calibrate(options, inputs, model, layers, cached, phases)
    quantized = [*layers, *cached]
    fake_quant = _evaluate(inputs, model, quantized, phases) if inputs.windows else None
    if options.megatron_save_path is not None:
        with phases.time("save"):
            path, config = options.megatron_save_path, dict(job.hf_config)
            save_model(model, path, job.source, config, groups)
    check = None
    if options.export_dir is not None:
        found = (calibration.weight_amax, calibration.input_amax, kv_amax)
        digest = together(groups, lambda: statistics_digest(job, options, *found))
        produced = producer(model, layers, cached, _drafts(job))
        source = job.source if options.megatron_load_path is None else None
        check = Verification(options.export_dir, source, groups, phases)
        _export(options, inputs, model, produced, digest, phases, check)
    report = check.report if check else None
    left_out = inputs.companions.left_out if inputs.companions else ()
    return Outcome(
        job=job,
        calibration=calibration,
        kv_amax=kv_amax,
        statistics=statistics(model),
        fake_quant=fake_quant,
        verified=report,
        left_out=left_out,
    )


def _model(inputs: Inputs, groups: Groups, phases: Phases) -> LiveModel:
    """The model; its weights are those of the Hugging Face checkpoint, where there is one."""
    job = inputs.job
    assert job.architecture is not None, "a live model needs a table"
    if inputs.checkpoint is None:
        return empty_model(job.architecture, job.hf_config, job.layout, groups, job.dtype)
    live = [param for param in job.params if param.role is not Role.DRAFT]
    held = together(groups, lambda: len(local_params(live, job.layout, groups.rank)))
    with phases.bar("load", held) as progress:
        return load_model(
            inputs.checkpoint, job.architecture, job.layout, groups, job.dtype, progress
        )


def _restore(
    job: Job,
    model: LiveModel,
    layers: list[QuantLayer],
    cached: list[CachedTensor],
    saved: Saved,
    phases: Phases,
) -> tuple[CalibrationReport, dict[str, float]]:
    with phases.time("load"):
        restore(model, layers, cached, job.quant, saved, ExpertScales(job.expert_scales))
    return CalibrationReport({}, {}, {}, ()), {}


def statistics(model: LiveModel) -> list[tuple[str, tuple[int, ...], float]]:
    """State name (global layer), shape and largest value of every amax that this rank holds."""
    return [
        (model.global_name(number, name), tuple(amax.shape), float(amax.max()))
        for number, chunk in enumerate(model.chunks)
        for name, amax in chunk.named_buffers()
        if name.endswith("_amax")
    ]


def _attach(
    inputs: Inputs, model: LiveModel, scales: ExpertScales
) -> tuple[list[QuantLayer], list[CachedTensor]]:
    job = inputs.job
    layers, cached = attach_model(model, job.quant, scales)
    if inputs.kept is not None:
        keep_scales(layers, model, inputs.kept)
    about = describe_run(job.recipe, job.quant, job.expert_scales, inputs.origin.source)
    describe_model(model, about, layers)
    return layers, cached


def _calibrate(
    options: QuantizeOptions,
    inputs: Inputs,
    model: LiveModel,
    layers: list[QuantLayer],
    cached: list[CachedTensor],
    phases: Phases,
) -> tuple[CalibrationReport, dict[str, float]]:
    batches: list[torch.Tensor] = []
    if inputs.batches:
        size = mpu.get_data_parallel_world_size()
        batches = shard(inputs.batches, mpu.get_data_parallel_rank(), size)
    with phases.bar("calibrate", len(batches)) as progress:
        # One call for all: a pipeline is full only while batches follow one another.
        steps = iter([partial(run_schedule, model.chunks, batches, _drop, progress)])
        with watch(cached) as seen:
            report = calibrate(
                layers,
                inputs.job.quant,
                model.groups,
                steps,
                ColdExperts(options.cold_experts),
                token_replicas=model.layout.etp_size,
                act_percentile=options.act_percentile,
            )
            run_rest(layers, steps)
        return report, calibrate_kv_cache(cached, inputs.job.quant, model.groups, seen)


def _drop(logits: torch.Tensor) -> None:
    """Calibration looks at inputs of layers alone."""


def _evaluate(
    inputs: Inputs, model: LiveModel, layers: list[QuantLayer | CachedTensor], phases: Phases
) -> Sums:
    size = mpu.get_data_parallel_world_size()
    vocab_size = inputs.job.hf_config["vocab_size"]
    with phases.bar("evaluate", -(-len(inputs.windows) // size)) as progress:
        return evaluate_model(
            model.chunks, layers, inputs.windows, vocab_size, model.groups, progress
        )


def _export(  # noqa: PLR0913
    options: QuantizeOptions,
    inputs: Inputs,
    model: LiveModel,
    produced: Produce,
    scales: str,
    phases: Phases,
    check: Verification,
) -> None:
    """Write the files; ``scales``: digest of what calibration found."""
    plan, beside = inputs.job.export, inputs.companions
    assert plan is not None and beside is not None
    own = sum(part.nbytes for part in plan.parts_of(model.groups.rank))
    with phases.transfer("export", own) as progress:
        export(
            plan,
            model.groups,
            produced,
            Path(options.export_dir or ""),
            replace(beside, origin=replace(beside.origin, statistics=scales)),
            inputs.existing,
            progress,
            inputs.writing,
            check,
        )


def _drafts(job: Job) -> Produce | None:
    """Makes what no Megatron model has, layers for speculation, from the source's files."""
    if job.checkpoint is None:
        return None
    return Producer(source=PartSource(job.checkpoint, job.dtype), quant=job.quant, weight_amax={})


def producer(
    model: LiveModel,
    layers: Sequence[QuantLayer],
    cached: Sequence[CachedTensor] = (),
    drafts: Produce | None = None,
) -> Callable[[RankPart], Iterable[Produced]]:
    """What the export asks for each part: the live weight with its quantizers' amaxes.

    drafts: makes the parts of layers for speculation, which the model has not.
    """
    tensors = {local.param.name: local for local in model.local}
    amaxes = {
        decision.slot.name: (layer, index)
        for layer in layers
        for index, decision in enumerate(layer.decisions)
    }

    scales = {tensor.slot.name: tensor for tensor in cached}

    def of_part(part: RankPart) -> Iterable[Produced]:
        if part.param.role is Role.DRAFT:
            assert drafts is not None, part.param.name
            return drafts(part)
        if part.param.name in scales:
            return produce_cache_scale(part, scales[part.param.name].amax())
        local = model.tensor(tensors[part.param.name])
        if part.param.name not in amaxes:
            return produce(part, local)
        layer, index = amaxes[part.param.name]
        amax, inputs = layer.weight_amax(index), layer.input_amax()
        kept = layer.scales(index, part.region)
        if kept is not None:
            return produce(part, local, amax, inputs, scales=kept)
        return produce(part, local, amax, inputs, layer.block_stat(index, part.region))

    return of_part
