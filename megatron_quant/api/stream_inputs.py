"""Input scales from a forward of the transformers model itself."""

from typing import TYPE_CHECKING

import torch

from megatron_quant.api.agree import check_tokens
from megatron_quant.api.job import Job
from megatron_quant.api.options import QuantizeOptions
from megatron_quant.api.phases import Phases
from megatron_quant.dist import Groups, together
from megatron_quant.models.config import positive
from megatron_quant.models.stacks import text_config
from megatron_quant.stream.inputs import InputAmaxes, merge, save, static_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def calibrate_inputs(
    options: QuantizeOptions, job: Job, groups: Groups, phases: Phases
) -> InputAmaxes:
    """Run the calibration data through the model, shared over the ranks, and merge what was seen.

    Collective. Raises the QuantError of what is wrong with data or model, on every rank.
    """
    # Only here: transformers takes seconds to import.
    from megatron_quant.api.batches import calibration_batches, check_ids
    from megatron_quant.calib.data import shard
    from megatron_quant.stream.model import keys_of, load, run, watched
    from megatron_quant.stream.observe import InputAmax

    params = static_inputs(job.quant, job.params)
    with phases.time("load"):

        def start() -> tuple[list[torch.Tensor], "PreTrainedModel", InputAmax]:
            batches = calibration_batches(options, job.source)
            check_ids(batches, job.source, positive(text_config(job.hf_config), "vocab_size"))
            model = load(job.source, job.dtype)
            return batches, model, InputAmax(watched(model, params))

        batches, model, seen = together(groups, start)
        check_tokens(groups, batches)
    own = shard(batches, groups.rank, groups.size)

    def forward() -> None:
        with phases.bar("calibrate", len(own)) as progress, torch.no_grad(), seen:
            for batch in own:
                run(model, batch)
                progress(1)

    together(groups, forward)
    return merge(job.quant, params, keys_of, seen.seen, options.cold_experts, groups)


def save_amaxes(options: QuantizeOptions, job: Job, amaxes: InputAmaxes) -> None:
    """Write what was measured where ``options`` say, by default beside the export."""
    assert options.export_dir is not None
    out = options.export_dir
    path = options.amax_file or out.with_name(f"{out.name}.amax.safetensors")
    save(path, static_inputs(job.quant, job.params), amaxes)
