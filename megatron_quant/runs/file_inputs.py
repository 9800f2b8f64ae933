"""Input scales from a forward of the transformers model itself."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_quant.alike import ids_once_a_host
from megatron_quant.ckpt.storage import overlap
from megatron_quant.dist import Groups, together
from megatron_quant.errors import ExportError
from megatron_quant.models import positive, text_config
from megatron_quant.runs.agree import check_tokens
from megatron_quant.runs.job import Job
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases
from megatron_quant.streaming import InputAmaxes, merge_amaxes, static_inputs, write_amaxes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def calibrate_inputs(
    options: QuantizeOptions, job: Job, groups: Groups, phases: Phases
) -> InputAmaxes:
    """Run the calibration data through the model and merge what the ranks saw. Collective.

    The ranks share the data. Raises a QuantError, on every rank, for a fault in data or model.
    """
    # Imported here: transformers takes seconds to load.
    from megatron_quant.calib import shard
    from megatron_quant.runs.batches import calibration_batches, check_ids
    from megatron_quant.streaming import WeightInputAmax, keys_of, load_model, run_model, watched

    params = static_inputs(job.quant, job.params)
    with phases.time("load"):

        def read() -> list[torch.Tensor]:
            batches = calibration_batches(options.calibration, job.source)
            vocabulary = positive(text_config(job.hf_config), "vocab_size")
            check_ids(batches, options.calibration, job.source, vocabulary)
            return batches

        def load() -> tuple["PreTrainedModel", WeightInputAmax]:
            model = load_model(job.source, job.dtype)
            return model, WeightInputAmax(watched(model, params))

        batches = ids_once_a_host(groups, read)
        check_tokens(groups, batches)
        model, seen = together(groups, load)
    own = shard(batches, groups.rank, groups.size)

    def forward() -> None:
        with phases.bar("calibrate", len(own)) as progress, torch.no_grad(), seen:
            for batch in own:
                run_model(model, batch)
                progress(1)

    together(groups, forward)
    return merge_amaxes(
        job.quant, params, keys_of, seen.seen, options.calibration.cold_experts, groups
    )


def check_amax_file(options: QuantizeOptions, source: Path) -> None:
    """Raise ExportError now if the amax file could not be written after the work."""
    path, out = _amax_file(options), options.export_dir
    assert out is not None
    if any(overlap(path, folder) for folder in (out, source)):
        raise ExportError(
            f"--amax-file {path} is, or lies in, --export-dir or the source checkpoint; choose "
            "another place"
        )
    folder = path.resolve().parent
    if folder in out.resolve().parents:  # the export creates it
        folder = next(at for at in (folder, *folder.parents) if at.exists())
    reason = ""
    if path.is_dir():
        reason = "is a directory"
    elif not folder.is_dir():
        reason = f"is in {folder}, which is no directory"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = "may not be written"
    if reason:
        raise ExportError(f"--amax-file {path} {reason}; choose another place")


def save_amaxes(options: QuantizeOptions, job: Job, amaxes: InputAmaxes) -> None:
    """Write the measured amaxes where ``options`` say; beside the export by default."""
    write_amaxes(_amax_file(options), static_inputs(job.quant, job.params), amaxes)


def _amax_file(options: QuantizeOptions) -> Path:
    out = options.export_dir
    assert out is not None
    return options.amax_file or out.with_name(f"{out.name}.amax.safetensors")
