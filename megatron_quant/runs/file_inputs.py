"""Input scales from a forward of the transformers model itself, or from an earlier one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron_quant.alike import ids_once_a_host
from megatron_quant.dist import Groups, together
from megatron_quant.models import positive, text_config
from megatron_quant.runs import file_layers
from megatron_quant.runs.agree import check_tokens
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.streaming import InputAmaxes, merge_amaxes, static_inputs

if TYPE_CHECKING:
    from megatron_quant.streaming import Workplace


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


def measure_inputs(
    options: QuantizeOptions,
    job: Job,
    batches: Sequence[torch.Tensor],
    place: "Workplace",
    groups: Groups,
    phases: Phases,
) -> InputAmaxes:
    """Run the calibration data through the model and merge what the ranks saw. Collective.

    The ranks share the data. The model runs layer by layer, or as a whole where transformers' class
    cannot do that. Raises a QuantError, on every rank, for a fault in the model.
    """
    from megatron_quant.streaming import keys_of

    params = static_inputs(job.quant, job.params)
    own = batches[groups.rank :: groups.size]
    seen = file_layers.by_layers(job, params, own, groups, phases, place)
    if seen is None:
        seen = file_layers.at_once(job, params, own, groups, phases)
    return merge_amaxes(job.quant, params, keys_of, seen, options.calibration.cold_experts, groups)


def load_inputs(options: QuantizeOptions, job: Job, groups: Groups) -> InputAmaxes:
    """Read what an earlier calibration measured. Collective.

    Raises the QuantError of what is wrong with the file, on every rank.
    """
    from megatron_quant.calib import loaded_amaxes, read_calibration

    path = options.calibration.load
    assert path is not None, "nothing to load"
    params, plan = static_inputs(job.quant, job.params), job.quant.by_name

    def read() -> dict[str, torch.Tensor]:
        found = loaded_amaxes(read_calibration(path), [plan[p.name] for p in params])
        return {name: torch.tensor(value) for name, value in found.items()}

    seen, cold = together(groups, read), options.calibration.cold_experts
    return merge_amaxes(job.quant, params, lambda param: (param.name,), seen, cold, groups)


def save_inputs(options: QuantizeOptions, job: Job, amaxes: InputAmaxes) -> None:
    """Write what was measured where ``options`` say.

    Raises ExportError for what the disk refuses; an older file is there then.
    """
    from megatron_quant.calib import AMAX, statistic_key, write_calibration

    path = options.calibration.save
    assert path is not None, "nowhere to save"
    tensors = {
        statistic_key(source.module, AMAX): torch.tensor(amaxes.found[param.name])
        for param in static_inputs(job.quant, job.params)
        if param.name in amaxes.found
        for source in param.sources
    }
    write_calibration(path, tensors)
