"""What a run reads besides weights: the open checkpoint, calibration batches, evaluation text."""

from dataclasses import dataclass

import torch

from megatron_quant.api.batches import calibration_batches, check_ids
from megatron_quant.api.job import Job, prepare
from megatron_quant.api.options import QuantizeOptions
from megatron_quant.api.target import check_not_source
from megatron_quant.ckpt.companions import Companions, companions
from megatron_quant.ckpt.reader import Checkpoint, open_checkpoint
from megatron_quant.ckpt.source import carry_over
from megatron_quant.ckpt.writer import Existing, check_target
from megatron_quant.evaluate.evaluate import read_windows


@dataclass(frozen=True)
class Inputs:
    """A run's inputs, checked.

    batches: token ids [B, S] each, empty where no input is quantized. windows: evaluation text,
    int64 [T + 1] each.
    """

    job: Job
    checkpoint: Checkpoint
    companions: Companions
    existing: Existing
    batches: list[torch.Tensor]
    windows: list[torch.Tensor]


def open_inputs(options: QuantizeOptions, world: int) -> Inputs:
    """Check everything that a run of ``world`` ranks needs, the target directory included.

    Raises the QuantError of whatever is wrong; nothing has been written then.
    """
    assert options.export_dir is not None, "an export needs a directory"
    job = prepare(options, world)
    checkpoint = open_checkpoint(job.source)
    checkpoint.check(job.params)
    files = companions(job.hf_config, job.quant, job.dialect, job.dtype, carry_over(job.source))
    existing = Existing.REPLACE if options.overwrite else Existing.REFUSE
    check_not_source(options.export_dir, job.source)
    check_target(options.export_dir, files, existing)
    windows = []
    if options.eval_text:
        windows = read_windows(job.source, options.eval_text, options.calib_seq_length)
    batches = []
    if job.quant.needs_data:
        batches = calibration_batches(options, job.source)
    check_ids([*batches, *windows], job.source, job.hf_config["vocab_size"])
    return Inputs(job, checkpoint, files, existing, batches, windows)
