"""What a run reads besides weights: the open checkpoint, calibration batches, evaluation text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_quant.api.job import Job, prepare
from megatron_quant.api.options import QuantizeOptions
from megatron_quant.api.save import check_save_path
from megatron_quant.calib.data import load_texts, token_batches
from megatron_quant.ckpt.companions import Companions, companions
from megatron_quant.ckpt.reader import Checkpoint, open_checkpoint
from megatron_quant.ckpt.saved import Saved
from megatron_quant.ckpt.source import carry_over
from megatron_quant.ckpt.writer import Existing, check_target
from megatron_quant.errors import CheckpointError, ExportError
from megatron_quant.evaluate.evaluate import read_windows
from megatron_quant.evaluate.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """A run's inputs, checked.

    checkpoint: of the weights; None where they come from a Megatron checkpoint. companions: None
    where nothing is exported. batches: token ids [B, S] each, empty where no input is quantized.
    windows: evaluation text, int64 [T + 1] each.
    """

    job: Job
    checkpoint: Checkpoint | None
    companions: Companions | None
    existing: Existing
    batches: list[torch.Tensor]
    windows: list[torch.Tensor]


def open_inputs(options: QuantizeOptions, world: int, saved: Saved | None = None) -> Inputs:
    """Check everything that a run of ``world`` ranks needs, the target directories included.

    saved: what ``options.megatron_load_path`` holds.
    Raises the QuantError of whatever is wrong; nothing has been written then.
    """
    job = prepare(options, world, saved)
    checkpoint = None
    if saved is None:
        checkpoint = open_checkpoint(job.source)
        checkpoint.check(job.params)
    existing = Existing.REPLACE if options.overwrite else Existing.REFUSE
    files = None
    if options.export_dir is not None:
        assert job.dialect is not None
        files = companions(job.hf_config, job.quant, job.dialect, job.dtype, carry_over(job.source))
        _check_not_source(options.export_dir, job.source)
        check_target(options.export_dir, files, existing)
    if options.megatron_save_path is not None:
        check_save_path(options.megatron_save_path, existing)
    windows = []
    if options.eval_text:
        windows = read_windows(job.source, options.eval_text, options.calib_seq_length)
    batches = _batches(options, job) if saved is None else []
    _check_ids([*batches, *windows], job)
    return Inputs(job, checkpoint, files, existing, batches, windows)


def _check_not_source(export_dir: Path, source: Path) -> None:
    if export_dir.is_dir() and export_dir.samefile(source):
        raise ExportError(
            f"--export-dir {export_dir} is the source checkpoint; choose another directory"
        )


def _check_ids(tokens: Sequence[torch.Tensor], job: Job) -> None:
    vocab_size = job.hf_config["vocab_size"]
    largest = max((int(ids.max()) for ids in tokens), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{job.source}: the tokenizer gives token {largest}, but vocab_size in config.json is "
            f"{vocab_size}; put the tokenizer there that the model was trained with"
        )


def _batches(options: QuantizeOptions, job: Job) -> list[torch.Tensor]:
    if not job.quant.needs_data:
        return []
    try:
        tokenizer = load_tokenizer(job.source)
    except CheckpointError as e:
        raise CheckpointError(f"{e}, or quantize with --weight-only") from None
    texts = load_texts(options.calib_dataset)
    return token_batches(
        texts, tokenizer, options.calib_size, options.calib_seq_length, options.calib_batch_size
    )
