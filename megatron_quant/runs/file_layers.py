"""Run the calibration text of a streamed checkpoint through transformers' model of it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_quant.ckpt.plan import Origin, digest_of
from megatron_quant.ckpt.read import Weights, open_stored
from megatron_quant.ckpt.write import Existing
from megatron_quant.dist import Groups, Meetings, together
from megatron_quant.errors import CalibrationError, LostRankError
from megatron_quant.mcore.checkpoint import PlainWeights
from megatron_quant.models import Param, Role
from megatron_quant.runs.destination import existing_of
from megatron_quant.runs.job import Job
from megatron_quant.runs.layer_walk import walked
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.weight_scales import weight_amaxes
from megatron_quant.streaming import (
    InputSums,
    MeasuredSums,
    PartSource,
    Producer,
    QuantizedWeights,
    SumsFile,
    calibrated_caches,
    static_inputs,
    weighed_inputs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megatron_quant.streaming import Seen, Workplace


@dataclass(frozen=True)
class Measure:
    """The inputs that a walk measures.

    Attributes:
        params: Parameters whose inputs are watched.
        scales: Amaxes of inputs by slot, by whose scales the sums of what codes lose are made. None
            for the largest inputs alone: no sums, no keys and values, and no layer behind others
            that are rounded.
    """

    params: Sequence[Param]
    scales: Mapping[str, torch.Tensor] | None


def by_layers(
    job: Job,
    measure: Measure,
    batches: Sequence[torch.Tensor],
    groups: Groups,
    phases: Phases,
    place: "Workplace",
) -> "Seen | None":
    """Return this rank's observations; None, on every rank, where one cannot go layer by layer."""
    # Imported here: transformers takes seconds to load.
    from megatron_quant.streaming import RoundedLayers, Skeleton, Walk, steps

    params, alone = measure.params, measure.scales is None
    weights = _behind(job, place, groups, phases) if job.sequential and not alone else None
    caches = {} if alone else calibrated_caches(job.quant, job.params)

    def walk(skeleton: Skeleton, progress: Callable[[int], None], meetings: Meetings) -> Walk:
        behind = None
        if weights is not None:
            behind = RoundedLayers(
                weights=weights, dtype=job.dtype, place=place, groups=groups, meetings=meetings
            )
        return Walk(
            skeleton=skeleton,
            params=params,
            batches=batches,
            place=place,
            on_batch=progress,
            sums=None if alone else _sums_file(job, place, groups.rank),
            input_amax=measure.scales or {},
            caches=caches,
            expert_share=job.expert_share,
            behind=behind,
        )

    def build() -> Skeleton:
        return Skeleton(_loadable(job), job.dtype)

    def total(skeleton: Skeleton) -> int:
        return steps(params, caches, len(skeleton.layers)) * len(batches)

    seen, _, reason = walked(build, walk, total, groups, phases)
    if not reason:
        return seen
    if groups.rank == 0:
        logging.getLogger(__name__).warning(
            "%s: transformers' model cannot run layer by layer (%s): every rank loads all of it",
            job.source,
            reason,
        )
    return None


def _loadable(job: Job) -> Weights:
    """Return the weights by names that transformers loads."""
    return job.checkpoint if isinstance(job.checkpoint, PlainWeights) else open_stored(job.source)


def _behind(job: Job, place: "Workplace", groups: Groups, phases: Phases) -> QuantizedWeights:
    """Return the checkpoint as it is once its layers are rounded by the sums that are there."""
    checkpoint = job.checkpoint
    assert checkpoint is not None, "a stream has one"
    amaxes = weight_amaxes(job, PartSource(checkpoint, job.dtype), groups, phases)[1]
    quantized = {decision.slot.name for decision in job.quant.quantized}
    slots = {s.name: p.name for p in job.params if p.name in quantized for s in p.sources}

    def values(name: str, w: torch.Tensor) -> torch.Tensor:
        producer = Producer(
            source=PartSource(checkpoint, job.dtype),
            quant=job.quant,
            weight_amax=amaxes,
            sums=measured_sums(job, place, groups),
        )
        return producer.values(slots[name], w.to(job.dtype))

    return QuantizedWeights(checkpoint, slots, values)


def measured_sums(job: Job, place: "Workplace", groups: Groups) -> InputSums:
    """Return the sums that all ranks have measured."""
    files = [_sums_file(job, place, rank) for rank in range(groups.size)]
    return MeasuredSums([file for file in files if file is not None])


def _sums_file(job: Job, place: "Workplace", rank: int) -> SumsFile | None:
    weighed = weighed_inputs(job.quant, job.params)
    if not weighed:
        return None
    return SumsFile(place.sums(rank), [job.quant.by_name[param.name] for param in weighed])


def at_once(
    job: Job,
    params: Sequence[Param],
    batches: Sequence[torch.Tensor],
    groups: Groups,
    phases: Phases,
) -> "Seen":
    """Return this rank's observations of the whole model."""
    if isinstance(job.checkpoint, PlainWeights):
        raise CalibrationError(
            f"{job.checkpoint.path}: this model of a training run cannot run layer by layer: leave "
            "out --stream, or pass --weight-only"
        )
    from megatron_quant.streaming import (
        WeightInputAmax,
        forced_experts,
        load_model,
        run_model,
        watched,
    )

    def start() -> tuple["PreTrainedModel", WeightInputAmax]:
        model = load_model(job.source, job.dtype)
        return model, WeightInputAmax(watched(model, params))

    with phases.time("load"):
        model, seen = together(groups, start)

    heads = [param.name for param in params if param.role is Role.OUTPUT]

    def forward() -> None:
        with (
            phases.bar("calibrate", len(batches)) as progress,
            torch.no_grad(),
            seen,
            forced_experts(model, job.expert_share, seen),
        ):
            for batch in batches:
                last = run_model(model, batch).last_hidden_state
                for head in heads:
                    seen.on_input(head, last)
                progress(1)

    together(groups, forward)
    return seen.found


@contextmanager
def workplace(
    options: QuantizeOptions,
    job: Job,
    origin: Origin,
    batches: Sequence[torch.Tensor],
    groups: Groups,
) -> "Iterator[Workplace | None]":
    """Hold the folder in which the calibration of a run is kept until its export is there.

    Where the run fails nothing stays, but with ``--resume`` and where a rank was lost. None where
    nothing is calibrated.
    """
    if not batches:
        yield None
        return
    from megatron_quant.streaming import Workplace

    keys = [param.name for param in static_inputs(job.quant, job.params)]
    sums = [
        [d.slot.name, d.rounds, d.needs_squares, d.needs_peaks, d.serves_codes]
        for d in (job.quant.by_name[p.name] for p in weighed_inputs(job.quant, job.params))
    ]
    text = digest_of([ids.tolist() for ids in batches])
    caches = calibrated_caches(job.quant, job.params)
    measured = [keys, sums, list(caches.items()), job.expert_share]
    if job.sequential:  # then it depends on how the layers before are rounded
        measured += [origin.recipe, job.expert_scales]
    made_of = digest_of([origin.source, str(job.dtype), groups.size, measured, text])
    existing = existing_of(options.write)
    place = Workplace(work_folder(options), made_of, existing, groups)
    try:
        yield place
    except Exception as error:
        if existing is not Existing.RESUME and not isinstance(error, LostRankError):
            place.remove()
        raise
    else:
        place.remove()
    finally:
        place.leave()


def work_folder(options: QuantizeOptions) -> Path:
    """Return where the calibration of a run is kept."""
    out = options.export_dir
    assert out is not None
    return out.with_name(f"{out.name}.calibration")
