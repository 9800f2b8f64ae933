"""What a run reads besides weights: the open checkpoint, calibration batches, evaluation text."""

from dataclasses import dataclass

import torch

from megatron_quant.api.batches import calibration_batches, check_ids
from megatron_quant.api.job import Job, prepare, replanned
from megatron_quant.api.options import QuantizeOptions
from megatron_quant.api.target import check_not_source, existing_of, origin_of
from megatron_quant.ckpt.companions import Companions, companions
from megatron_quant.ckpt.keep import keeping
from megatron_quant.ckpt.pipeline import WriteOptions
from megatron_quant.ckpt.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.reader import Weights
from megatron_quant.ckpt.source import carry_over
from megatron_quant.ckpt.sources import open_source
from megatron_quant.ckpt.target import Existing, check_target
from megatron_quant.evaluate.evaluate import read_windows


@dataclass(frozen=True)
class Inputs:
    """A run's inputs, checked.

    kept: the checkpoint, where the export keeps its scales.
    batches: token ids [B, S] each, empty where no input is quantized. windows: evaluation text,
    int64 [T + 1] each.
    """

    job: Job
    checkpoint: Weights
    kept: QuantizedCheckpoint | None
    companions: Companions
    existing: Existing
    writing: WriteOptions
    batches: list[torch.Tensor]
    windows: list[torch.Tensor]


def open_inputs(options: QuantizeOptions, world: int) -> Inputs:
    """Check everything that a run of ``world`` ranks needs, the target directory included.

    Raises the QuantError of whatever is wrong; nothing has been written then.
    """
    assert options.export_dir is not None, "an export needs a directory"
    existing = existing_of(options.overwrite, options.resume)
    writing = WriteOptions(options.io_threads, options.fsync)
    job = prepare(options, world)
    checkpoint = open_source(job.source)
    checkpoint.check(job.params)
    kept = None
    if options.keep_scales:
        quant, kept = keeping(job.quant, checkpoint)
        job = replanned(job, quant, options)
    check_not_source(options.export_dir, job.source)
    carried, origin = carry_over(job.source), origin_of(job)
    files = companions(job.hf_config, job.quant, job.dialect, job.dtype, carried, origin)
    check_target(options.export_dir, files, existing, job.export)
    windows = []
    if options.eval_text:
        windows = read_windows(job.source, options.eval_text, options.calib_seq_length)
    batches = []
    if job.quant.needs_data:
        batches = calibration_batches(options, job.source)
    check_ids([*batches, *windows], job.source, job.hf_config["vocab_size"])
    return Inputs(job, checkpoint, kept, files, existing, writing, batches, windows)
