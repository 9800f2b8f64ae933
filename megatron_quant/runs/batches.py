"""Calibration text as token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_quant.calib import load_texts, token_batches
from megatron_quant.errors import CheckpointError
from megatron_quant.evaluation import TokenizerChoice
from megatron_quant.runs.settings import Calibration

if TYPE_CHECKING:
    from megatron_quant.calib import CalibrationFile, InputRules
    from megatron_quant.mcore.live import KeepSettings


def tokenizer_choice(calibration: Calibration) -> TokenizerChoice:
    """Return the tokenizer that ``calibration`` asks for."""
    return TokenizerChoice(calibration.tokenizer, calibration.trust_remote_code)


def input_rules(
    calibration: Calibration, loaded: "CalibrationFile | None", counted: int | None = None
) -> "InputRules":
    """Return how ``calibration`` makes scales of inputs: those it sees, or those ``loaded`` has.

    counted: number of this rank's batches that repeat no other rank's; None for all.
    """
    from megatron_quant.calib import ColdExperts, InputRules  # ModelOpt, which files do without

    cold = ColdExperts(calibration.cold_experts)
    return InputRules(
        cold_experts=cold,
        act_percentile=calibration.act_percentile,
        loaded=loaded,
        counted=counted,
        expert_share=calibration.expert_share,
    )


def keep_settings(calibration: Calibration) -> "KeepSettings":
    """Return what a live calibration keeps, and how much of it a rank holds at a time."""
    from megatron_quant.mcore.live import KeepSettings  # Megatron, which files do without

    return KeepSettings(calibration.save, calibration.keep_hessians, calibration.memory_bytes)


def calibration_batches(
    calibration: Calibration, source: Path, vocab_size: int
) -> list[torch.Tensor]:
    """Return the batches that ``calibration`` asks for, [B, S] each.

    source: the checkpoint; its tokenizer is used if ``calibration`` names none.

    Raises CheckpointError if there is no tokenizer, or if it gives a token that the model does not
    have, CalibrationError if there is too little text.
    """
    try:
        tokenizer = tokenizer_choice(calibration).load(source)
    except CheckpointError as e:
        raise CheckpointError(f"{e}, or quantize with --weight-only") from None
    texts = load_texts(calibration.dataset)
    batches = token_batches(
        texts, tokenizer, calibration.size, calibration.seq_length, calibration.batch_size
    )
    check_ids(batches, calibration, source, vocab_size)
    return batches


def check_ids(
    tokens: Sequence[torch.Tensor], calibration: Calibration, source: Path, vocab_size: int
) -> None:
    """Raise CheckpointError for a token that the model does not have."""
    largest = max((int(ids.max()) for ids in tokens), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{calibration.tokenizer or source}: the tokenizer gives token {largest}, but "
            f"vocab_size in config.json is {vocab_size}; use the tokenizer that the model was "
            "trained with"
        )
