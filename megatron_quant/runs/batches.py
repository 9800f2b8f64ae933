"""Calibration text as the token ids of a checkpoint's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_quant.calib import load_texts, token_batches
from megatron_quant.errors import CheckpointError
from megatron_quant.evaluation import load_tokenizer
from megatron_quant.runs.settings import Calibration


def calibration_batches(calibration: Calibration, source: Path) -> list[torch.Tensor]:
    """What ``calibration`` asks for, [B, S] each.

    Raises CheckpointError without a tokenizer and CalibrationError where there is too little text.
    """
    try:
        tokenizer = load_tokenizer(source)
    except CheckpointError as e:
        raise CheckpointError(f"{e}, or quantize with --weight-only") from None
    texts = load_texts(calibration.dataset)
    return token_batches(
        texts, tokenizer, calibration.size, calibration.seq_length, calibration.batch_size
    )


def check_ids(tokens: Sequence[torch.Tensor], source: Path, vocab_size: int) -> None:
    """CheckpointError for a token that the model does not have."""
    largest = max((int(ids.max()) for ids in tokens), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer gives token {largest}, but vocab_size in config.json is "
            f"{vocab_size}; put the tokenizer there that the model was trained with"
        )
