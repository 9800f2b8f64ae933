"""The loss whose gradients score, and what is said of one that is not finite."""

from collections.abc import Callable
from math import isfinite

import torch
import torch.nn.functional as F

from megatron_quant.errors import CalibrationError

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits fp32 [B, S, V] and token ids int64 [B, S] -> the sum of the losses of all tokens, []."""


def next_token_loss(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of each next token, summed: a :data:`Loss`."""
    flat = logits_BSV[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(flat, ids_BS[:, 1:].flatten().to(flat.device), reduction="sum")


def check_loss(loss: float) -> None:
    """Raise CalibrationError if the loss is not finite."""
    if not isfinite(loss):
        raise CalibrationError(
            f"--auto-quantize-method gradient: the loss is {loss}; repair the checkpoint, or "
            "choose another --dtype or --calib-dataset"
        )


def check_score(method: str, score: float, place: str, action: str) -> None:
    """Raise CalibrationError if the score of a place in a format is not finite."""
    if not isfinite(score):
        raise CalibrationError(
            f"--auto-quantize-method {method}: the score is {score} with {place} in "
            f"{action}; repair the checkpoint, or choose another --dtype"
        )
