"""Quantize file to file: without a Megatron model, in memory that does not grow with the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_quant.ckpt.plan import Companions, Layout
from megatron_quant.ckpt.read import (
    KeptScales,
    QuantizedCheckpoint,
    Weights,
    check_fused,
    check_weights,
    keeping,
    kept_dtypes,
    logical,
    sharing,
)
from megatron_quant.ckpt.storage import resolve_source
from megatron_quant.ckpt.verify import Report
from megatron_quant.dist import Groups, together
from megatron_quant.errors import LayoutError, QuantError
from megatron_quant.folding import DOCUMENT
from megatron_quant.runs.agree import check_options, check_plans, fetched
from megatron_quant.runs.destination import (
    check_places,
    checked_companions,
    destination,
    existing_of,
    origin_of,
    statistics_digest,
    verification,
    write_shown,
)
from megatron_quant.runs.drafts import check_measurable, quantized_drafts
from megatron_quant.runs.file_inputs import (
    MeasuredInputs,
    calibration_text,
    load_inputs,
    measure_inputs,
    save_inputs,
)
from megatron_quant.runs.file_layers import workplace
from megatron_quant.runs.found import Found
from megatron_quant.runs.job import Job, SourceModel, decide, replanned
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.start import Unquantized, opened_unquantized, original
from megatron_quant.runs.weight_scales import weight_amaxes
from megatron_quant.streaming import (
    FoldedSums,
    InputAmaxes,
    PartSource,
    Producer,
    bounded_parts,
    find_fold,
    folded_amaxes,
    with_carried,
)


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """The findings of a run.

    weight_amax: one for each slot that has a tensor scale. inputs: None if none was measured.
    verified: None with ``--no-verify``. left_out: what the source has and the export lacks.
    seconds: of each phase. found: the search for the recipe; None if it was given. tokens: those
    that each expert's weights were measured for. kv_amax: the largest keys and values by cache
    slot, if the KV cache was calibrated.
    """

    job: Job
    weight_amax: Mapping[str, float]
    inputs: InputAmaxes | None
    verified: Report | None
    left_out: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    found: Found | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    kv_amax: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """All that is known before weights are read.

    checkpoint: the source, by the names of the export. kept: the checkpoint whose scales the
    export keeps; None if weights get their own.
    """

    job: Job
    checkpoint: Weights
    kept: KeptScales | None


def plan_stream(options: QuantizeOptions, world: int, opened: Unquantized | None = None) -> Planned:
    """Check, from config.json and the weights' headers, everything that needs no weights.

    Raises a QuantError for whatever does not fit, before anything is written.
    """
    _check_flags(options)
    assert options.hf_model_id is not None, "checked with the flags"
    directory = resolve_source(options.hf_model_id, weights=options.megatron_load_path is None)
    source = (opened or Unquantized()).open_weights(directory)
    checkpoint, structure = logical(source)
    check_weights(checkpoint, structure.params)
    kept, params = kept_dtypes(checkpoint), structure.params
    model = SourceModel(
        source=directory,
        hf_config=checkpoint.config,
        architecture=None,
        params=params,
        kept=kept,
        checkpoint=checkpoint,
    )
    job = decide(options, model, Layout.simulate(world, 1, 1, 1))
    quantized_drafts(job.quant, checkpoint, params)
    if options.calibration.load is None:
        check_measurable(job.quant)
    keeps, carries = None, job.dialect is not None and job.dialect.carries
    if options.keep_scales:
        quant, _ = keeping(job.quant, source, finer=True)
        job = replanned(job, quant, options)
    if options.keep_scales or carries:
        assert isinstance(source, QuantizedCheckpoint), "which has scales"
        check_fused(job.quant, source)
        fused = sharing(job.quant)
        every = options.keep_scales
        keeps = KeptScales(checkpoint=source, plan=job.quant, every=every, shared=fused)
    return Planned(replace(job, export=bounded_parts(job.exported)), checkpoint, keeps)


def stream_files(options: QuantizeOptions, groups: Groups, phases: Phases) -> Streamed:
    """Quantize a Hugging Face checkpoint into ``options.export_dir``, file to file.

    Collective; the ranks share the tensors. Raises the same QuantError on every rank, before
    anything is written or after removing what was.
    """
    out = options.export_dir
    assert out is not None, "an export needs a directory"
    check_options(options, groups)
    with phases.time("plan"):
        options = fetched(options, groups)
        together(groups, lambda: check_places(options))
        options, opened = opened_unquantized(options, groups)
        planned = together(groups, lambda: plan_stream(options, groups.size, opened))
        job = planned.job
        existing = existing_of(options.write)
        origin = together(groups, lambda: origin_of(job))
        check_plans(groups, origin, job.export)
        files = together(groups, lambda: checked_companions(job, out, existing, origin))
    batches = calibration_text(options, job, groups, phases)
    with workplace(options, job, origin, batches, groups) as place:
        inputs = None
        if place is not None:
            inputs = measure_inputs(options, job, batches, place, groups, phases)
        elif job.quant.needs_data:
            inputs = load_inputs(options, job, groups)
        return _written(options, planned, files, inputs, groups, phases)


def _written(
    options: QuantizeOptions,
    planned: Planned,
    files: Companions,
    inputs: MeasuredInputs | None,
    groups: Groups,
    phases: Phases,
) -> Streamed:
    """Measure weights and write the export, with the input scales that were found."""
    job, out = planned.job, options.export_dir
    assert out is not None
    source = PartSource(planned.checkpoint, job.dtype)
    static, sums = (inputs.amaxes, inputs.sums) if inputs else (None, None)
    caches = inputs.caches if inputs else {}
    if job.places.folded:
        assert sums is not None, "measured or loaded before"
        with phases.time("fold"):
            fold = find_fold(source, job.kept, job.places.folded, sums, groups)
        source, sums = replace(source, fold=fold), FoldedSums(sums, fold)
        static = folded_amaxes(job.quant, static, sums) if static else None
        files = files.with_document(DOCUMENT, fold.document())
    found, amaxes = weight_amaxes(job, source, groups, phases)
    producer = Producer(
        source=source,
        quant=job.quant,
        weight_amax=amaxes,
        input_amax=with_carried(static.scales, job.quant) if static else {},
        sums=sums,
        cache_amax=caches,
        kept=planned.kept,
    )
    check = verification(options.write, out, original(job), groups, phases)
    files = _with_statistics(files, job, options, found, static, inputs)
    to = destination(options.write, out, files, check)
    write_shown(job.exported, groups, producer, to, phases)
    if inputs is not None and options.calibration.save is not None:
        measured = inputs
        first = groups.rank == 0
        together(groups, lambda: save_inputs(options, job, measured) if first else None)
    return Streamed(
        job=job,
        weight_amax=found,
        inputs=static,
        verified=check.report if check else None,
        left_out=files.left_out,
        tokens=inputs.tokens if inputs else {},
        kv_amax=caches,
    )


def _with_statistics(
    files: Companions,
    job: Job,
    options: QuantizeOptions,
    weights: Mapping[str, float],
    static: InputAmaxes | None,
    inputs: MeasuredInputs | None,
) -> Companions:
    """Add a digest of the findings to ``files``."""
    scales = static.scales if static else {}
    of_inputs = {name: float(amax) for name, amax in scales.items()}
    found: list[object] = [dict(weights), of_inputs]
    if inputs is not None and inputs.sums is not None:
        found.append(inputs.digest)
    if inputs is not None and inputs.caches:
        found.append(dict(inputs.caches))
    if DOCUMENT in files.documents:
        found.append(files.documents[DOCUMENT])
    statistics = statistics_digest(job, options, *found)
    return replace(files, origin=replace(files.origin, statistics=statistics))


def _check_flags(options: QuantizeOptions) -> None:
    sizes = {name: getattr(options.parallel, name) for name in ("tp", "cp", "ep", "etp", "pp")}
    if any(size > 1 for size in sizes.values()):
        given = " ".join(f"--{name} {size}" for name, size in sizes.items() if size > 1)
        raise LayoutError(
            f"{given} does not go with --stream: its ranks share the tensors, no model is cut; "
            "leave one of them out"
        )
    if options.megatron_save_path is not None:
        raise QuantError(
            "--megatron-save-path needs a Megatron model, and --stream has none: leave one of them "
            "out"
        )
    if options.eval_text:
        raise QuantError(
            "--eval-text needs a Megatron model, and --stream has none: run megatron-quant eval on "
            "the export"
        )
    if options.calibration.act_percentile < 100:
        raise QuantError("--stream cannot measure --act-percentile: leave one of them out")
