"""Open a run's inputs besides weights: checkpoint, calibration batches, evaluation text."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_quant.alike import ids_once_a_host
from megatron_quant.calib import CalibrationFile, read_calibration
from megatron_quant.ckpt.plan import Companions, Origin
from megatron_quant.ckpt.read import QuantizedCheckpoint, Weights, keeping, open_source
from megatron_quant.dist import Groups
from megatron_quant.evaluation import Text, read_windows
from megatron_quant.mcore.checkpoint import Saved
from megatron_quant.models import text_config
from megatron_quant.runs.batches import calibration_batches, check_ids, tokenizer_choice
from megatron_quant.runs.destination import checked_companions, existing_of, origin_of
from megatron_quant.runs.job import Job, OpenWeights, prepare_job, replanned
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.saving import SavePlace, check_save_path


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A run's inputs, checked.

    checkpoint: the weights; None if they come from a Megatron checkpoint. kept: the same
    checkpoint, if the export keeps its scales. companions: None if nothing is exported.
    calibrated: what an earlier run measured; None if this run measures. batches: token ids
    [B, S] each; empty if nothing is measured. windows: evaluation text, int64 [T + 1] each.
    """

    job: Job
    checkpoint: Weights | None
    kept: QuantizedCheckpoint | None
    origin: Origin
    companions: Companions | None
    calibrated: CalibrationFile | None
    batches: list[torch.Tensor] = field(default_factory=list)
    windows: list[torch.Tensor] = field(default_factory=list)


def open_inputs(
    options: QuantizeOptions,
    world: int,
    saved: Saved | None = None,
    open_weights: OpenWeights | None = open_source,
    config: Mapping[str, Any] | None = None,
) -> Inputs:
    """Check everything that a run of ``world`` ranks needs, the output directories included.

    Texts are read later, by :func:`with_texts`. saved: the quantized model in
    ``options.megatron_load_path``. open_weights: opens the weights of the model whose config.json
    is in a directory; None if they are ``saved``'s. config: as in :func:`prepare_job`.
    Raises a QuantError for whatever is wrong, before anything is written.
    """
    existing, load = existing_of(options.write), options.calibration.load
    job = prepare_job(options, world, saved, open_weights, config)
    checkpoint, kept = job.checkpoint, None
    if checkpoint is not None and options.keep_scales:
        quant, kept = keeping(job.quant, checkpoint)
        job = replanned(job, quant, options)
    files, origin = None, origin_of(job, saved)
    if options.export_dir is not None:
        files = checked_companions(job, options.export_dir, existing, origin)
    if options.megatron_save_path is not None:
        made_of = {"recipe": origin.recipe, "source": origin.source}
        check_save_path(SavePlace(options.megatron_save_path, existing, made_of))
    return Inputs(
        job=job,
        checkpoint=checkpoint,
        kept=kept,
        origin=origin,
        companions=files,
        calibrated=read_calibration(load) if load else None,
    )


def with_texts(
    inputs: Inputs, options: QuantizeOptions, saved: Saved | None, groups: Groups
) -> Inputs:
    """Add the tokens of calibration and evaluation, which one rank of each host reads. Collective.

    Raises a QuantError, on every rank, for whatever is wrong with the texts.
    """
    job, data = inputs.job, options.calibration
    size = text_config(job.hf_config)["vocab_size"]

    def read_text(path: Path) -> list[torch.Tensor]:
        text = Text(path, data.seq_length, tokenizer=tokenizer_choice(data))
        ids = read_windows(job.source, text)
        check_ids(ids, data, job.source, size)
        return ids

    windows, batches = list[torch.Tensor](), list[torch.Tensor]()
    if options.eval_text:
        windows = ids_once_a_host(groups, partial(read_text, options.eval_text))
    if job.quant.needs_data and saved is None and data.load is None:
        batches = ids_once_a_host(groups, lambda: calibration_batches(data, job.source, size))
    return replace(inputs, batches=batches, windows=windows)
