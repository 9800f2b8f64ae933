"""Input scales from a forward of the transformers model itself, or from an earlier one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_quant.alike import ids_once_a_host
from megatron_quant.ckpt.plan import digest_of
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CalibrationError
from megatron_quant.models import positive, text_config
from megatron_quant.recipes import Decision, Slot
from megatron_quant.runs import file_layers
from megatron_quant.runs.agree import check_tokens
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.streaming import (
    InputAmaxes,
    InputSums,
    merge_amaxes,
    merge_tokens,
    static_inputs,
    weighed_inputs,
)

if TYPE_CHECKING:
    from megatron_quant.calib import CalibrationFile, Late
    from megatron_quant.streaming import Seen, Workplace


def calibration_text(
    options: QuantizeOptions, job: Job, groups: Groups, phases: Phases
) -> list[torch.Tensor]:
    """Return the batches of token ids, equal on all ranks; none where no forward is run.

    Collective. Raises a QuantError, on every rank, for a fault in the data.
    """
    if not job.quant.needs_data or options.calibration.load is not None:
        return []
    # Imported here: transformers takes seconds to load.
    from megatron_quant.runs.batches import calibration_batches

    def read() -> list[torch.Tensor]:
        vocabulary = positive(text_config(job.hf_config), "vocab_size")
        return calibration_batches(options.calibration, job.source, vocabulary)

    with phases.time("load"):
        batches = ids_once_a_host(groups, read)
        check_tokens(groups, batches)
    return batches


@dataclass(frozen=True, kw_only=True)
class MeasuredInputs:
    """Statistics of inputs, measured or loaded.

    amaxes: None where no input has a static scale. found: the largest input of each slot that was
    reached. sums: None where no algorithm needs them. digest: of what they were measured with.
    caches: the largest keys and values by cache slot, if their scales are calibrated. tokens: those
    that each expert was measured for, by slot; empty if nothing was.
    """

    amaxes: InputAmaxes | None
    found: Mapping[str, float]
    sums: InputSums | None
    digest: str
    caches: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)


def measure_inputs(
    options: QuantizeOptions,
    job: Job,
    batches: Sequence[torch.Tensor],
    place: "Workplace",
    groups: Groups,
    phases: Phases,
) -> MeasuredInputs:
    """Run the calibration data through the model and merge what the ranks saw. Collective.

    The ranks share the data. The model runs layer by layer, or as a whole where transformers' class
    cannot do that. Raises a QuantError, on every rank, for a fault in the model.
    """
    from megatron_quant.calib import merge_cache
    from megatron_quant.streaming import input_keys

    static = static_inputs(job.quant, job.params)
    weighed = weighed_inputs(job.quant, job.params)
    params = [p for p in job.params if p in {*static, *weighed}]
    own, cold = batches[groups.rank :: groups.size], options.calibration.cold_experts

    def merged(seen: "Seen") -> InputAmaxes:
        return merge_amaxes(job.quant, static, input_keys, seen.amax, cold, groups)

    amaxes = None
    if any(d.serves_codes and d.static for d in job.quant.measured):
        # What codes lose depends on the scales, which are known once all ranks saw all batches.
        alone = file_layers.Measure(static, None)
        first = file_layers.by_layers(job, alone, own, groups, phases, place.for_scales())
        amaxes = merged(first) if first is not None else None
    scales = amaxes.scales if amaxes is not None else {}
    measure = file_layers.Measure(params, scales)
    seen = file_layers.by_layers(job, measure, own, groups, phases, place)
    if seen is None:
        if weighed:
            raise CalibrationError(
                "imatrix, gptq, awq and smoothquant measure layer by layer, which this model "
                "cannot run: take --algorithm max or mse, or leave out --stream"
            )
        if job.quant.kv_cache == "fp8":
            raise CalibrationError(
                "the KV cache is measured layer by layer, which this model cannot run: take "
                "--export-kv-cache-quant fp8_cast, or leave out --stream"
            )
        seen = file_layers.at_once(job, params, own, groups, phases)
    sums = None
    if static and amaxes is None:
        amaxes = merged(seen)
    found = dict(amaxes.found) if amaxes else {}
    if weighed:  # experts without tokens take the sums of their layer
        found |= merge_amaxes(job.quant, weighed, input_keys, seen.amax, "layer-max", groups).found
        sums = file_layers.measured_sums(job, place, groups)
    return MeasuredInputs(
        amaxes=amaxes,
        found=found,
        sums=sums,
        digest=place.made_of if weighed else "",
        caches=merge_cache(job.quant, groups, seen.amax),
        tokens=merge_tokens(params, input_keys, seen.tokens, groups),
    )


@dataclass(frozen=True)
class LoadedSums:
    """The sums of a calibration file."""

    file: "CalibrationFile"

    def squares(self, slot: Slot) -> torch.Tensor:
        """Return the sums of squares: fp32 [K]."""
        from megatron_quant.calib import SQUARES

        return self.file.needed(slot.sources, SQUARES, (slot.shape[1],))

    def moment(self, slot: Slot) -> torch.Tensor:
        """Return the sums of products: fp32 [K, K]."""
        from megatron_quant.calib import MOMENT

        cols = slot.shape[1]
        return self.file.needed(slot.sources, MOMENT, (cols, cols))

    def lost(self, decision: Decision) -> torch.Tensor:
        """Return the sums of (x - y) y^T, y what the codes of x stand for: fp32 [K, K]."""
        from megatron_quant.calib import lost_statistic

        slot, cols = decision.slot, decision.slot.shape[1]
        return self.file.needed(slot.sources, lost_statistic(decision), (cols, cols))

    def peaks(self, slot: Slot) -> torch.Tensor:
        """Return the largest magnitudes of the channels: fp32 [K]."""
        from megatron_quant.calib import PEAKS

        return self.file.needed(slot.sources, PEAKS, (slot.shape[1],))


def load_inputs(options: QuantizeOptions, job: Job, groups: Groups) -> MeasuredInputs:
    """Read what an earlier calibration measured. Collective.

    Raises the QuantError of what is wrong with the file, on every rank.
    """
    from megatron_quant.calib import loaded_amaxes, merge_cache, read_calibration

    path = options.calibration.load
    assert path is not None, "nothing to load"
    params, plan = static_inputs(job.quant, job.params), job.quant.by_name
    weighed = [plan[p.name] for p in weighed_inputs(job.quant, job.params)]
    channels: list[torch.Tensor] = []

    def read() -> tuple["CalibrationFile", dict[str, torch.Tensor]]:
        file = read_calibration(path)
        found = loaded_amaxes(file, [plan[p.name] for p in params])
        for decision in weighed:
            channels.extend(make() for make in _channels(LoadedSums(file), decision).values())
        return file, {name: torch.tensor(value) for name, value in found.items()}

    file, seen = together(groups, read)
    amaxes = None
    if params:
        cold = options.calibration.cold_experts
        amaxes = merge_amaxes(job.quant, params, lambda p: (p.name,), seen, cold, groups)
    return MeasuredInputs(
        amaxes=amaxes,
        found=amaxes.found if amaxes else {},
        sums=LoadedSums(file) if weighed else None,
        digest=digest_of([float(value.sum()) for value in channels]),
        caches=merge_cache(job.quant, groups, {}, file),
    )


def save_inputs(options: QuantizeOptions, job: Job, inputs: MeasuredInputs) -> None:
    """Write what was measured where ``options`` say.

    Raises ExportError for what the disk refuses; an older file is there then.
    """
    from megatron_quant.calib import write_calibration

    path = options.calibration.save
    assert path is not None, "nowhere to save"
    write_calibration(path, dict(_saved(options, job, inputs)))


def _saved(
    options: QuantizeOptions, job: Job, inputs: MeasuredInputs
) -> "Iterator[tuple[str, torch.Tensor | Late]]":
    """Yield the tensors of a calibration file, by name."""
    from megatron_quant.calib import AMAX, Late, cache_key, statistic_key

    for name, value in inputs.caches.items():
        yield cache_key(name), torch.tensor(value)
    sums = inputs.sums
    for decision in job.quant.quantized:
        slot, cols = decision.slot, decision.slot.shape[1]
        if slot.name in inputs.found:
            for module in slot.sources:
                yield statistic_key(module, AMAX), torch.tensor(inputs.found[slot.name])
        if sums is None or not decision.needs_channels:
            continue
        for statistic, make in _channels(sums, decision).items():
            for module in slot.sources:
                yield statistic_key(module, statistic), Late((cols,), make)
        if options.calibration.keep_hessians:
            for statistic, make in _products(sums, decision).items():
                yield statistic_key(slot.sources[0], statistic), Late((cols, cols), make)


def _channels(sums: InputSums, decision: Decision) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what makes each statistic of channels that a slot needs, by its name in a file."""
    from megatron_quant.calib import PEAKS, SQUARES

    found: dict[str, Callable[[], torch.Tensor]] = {}
    if decision.needs_squares:
        found[SQUARES] = partial(_squares, sums, decision)
    if decision.needs_peaks:
        found[PEAKS] = partial(sums.peaks, decision.slot)
    return found


def _products(sums: InputSums, decision: Decision) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what makes each sum of products that gptq needs, by its name in a file."""
    from megatron_quant.calib import MOMENT, lost_statistic

    found: dict[str, Callable[[], torch.Tensor]] = {}
    if decision.rounds:
        found[MOMENT] = partial(sums.moment, decision.slot)
    if decision.serves_codes:
        found[lost_statistic(decision)] = partial(sums.lost, decision)
    return found


def _squares(sums: InputSums, decision: Decision) -> torch.Tensor:
    if decision.rounds:
        return sums.moment(decision.slot).diagonal()
    return sums.squares(decision.slot)
