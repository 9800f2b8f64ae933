"""Measure a checkpoint on a text: perplexity, and divergence from a reference."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_quant.errors import CheckpointError, QuantError
from megatron_quant.evaluation.load import Load, Logits, decoded
from megatron_quant.evaluation.metrics import NOTHING, Sums, token_losses, windows
from megatron_quant.evaluation.parts import Breakdown, Parts, TokenClasses
from megatron_quant.evaluation.tokenizer import TokenizerChoice

BatchProgress = Callable[[list[torch.Tensor]], Iterable[torch.Tensor]]
"""Wraps a list that is iterated once, to show progress."""


@dataclass(frozen=True)
class Result:
    """The scores of a checkpoint on a text.

    Attributes:
        perplexity: exp of the mean negative log likelihood per token.
        kl: Mean KL(reference || model) per token, in nats; None without a reference.
        tokens: Number of predicted tokens.
        parts: Figures by position and by class of token.
    """

    perplexity: float
    kl: float | None
    tokens: int
    parts: Parts = field(default_factory=Parts)


@dataclass(frozen=True)
class Text:
    """A UTF-8 text file, and how much of it is read.

    Attributes:
        file: Its path.
        seq_length: Tokens predicted in each window.
        max_tokens: Most tokens in all; None for the whole text.
        tokenizer: Its tokenizer; the checkpoint's own by default.
    """

    file: Path
    seq_length: int = 512
    max_tokens: int | None = None
    tokenizer: TokenizerChoice = field(default_factory=TokenizerChoice)


def evaluate(
    directory: Path,
    text: Text,
    against: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    load: Load = decoded,
    progress: BatchProgress = iter,
) -> Result:
    """Measure a bf16 or quantized checkpoint over a text, in windows that do not overlap.

    Args:
        directory: The checkpoint.
        text: The text.
        against: Reference checkpoint with the same vocabulary, for the KL.
        dtype: Dtype of weights and arithmetic, in both.
        load: :func:`~megatron_quant.evaluation.load.decoded` reads by our codecs,
            :func:`~megatron_quant.evaluation.load.native` by transformers alone. The reference is
            always decoded.
        progress: Wraps the windows to show progress.

    Raises:
        QuantError: For a text that cannot be used.
        CheckpointError: For a checkpoint that cannot be used.
    """
    tokenizer = text.tokenizer.load(directory)
    cut = _cut(text, tokenizer)
    model = load(directory, dtype)
    reference = decoded(against, dtype) if against else None
    breakdown = Breakdown(text.seq_length, TokenClasses(tokenizer))
    total = score(model, progress(cut), reference, breakdown)
    kl = total.mean_kl if reference else None
    return Result(total.perplexity, kl, total.tokens, breakdown.parts)


def score(
    model: Logits,
    cut: Iterable[torch.Tensor],
    reference: Logits | None = None,
    breakdown: Breakdown | None = None,
) -> Sums:
    """Sum the losses of windows (each int64 [seq_length + 1]) under a model and its reference.

    breakdown: gets the losses by token.

    Raises:
        CheckpointError: If the two have different vocabularies.
    """
    total = NOTHING
    for window in cut:
        ids_T, labels_T = window[:-1], window[1:]
        logits_TV, ref_TV = model(ids_T), reference(ids_T) if reference else None
        if ref_TV is not None and ref_TV.shape != logits_TV.shape:
            raise CheckpointError(
                f"the model's vocabulary has {logits_TV.shape[-1]} tokens, the reference's "
                f"{ref_TV.shape[-1]}; compare with the checkpoint that was quantized"
            )
        losses = token_losses(logits_TV, ref_TV, labels_T)
        total += losses.sums
        if breakdown is not None:
            breakdown.add(window, losses)
    return total


def read_windows(directory: Path, text: Text) -> list[torch.Tensor]:
    """Cut a text into windows, each int64 [seq_length + 1].

    Args:
        directory: The checkpoint; its tokenizer is used if ``text`` names none.
        text: The text.

    Raises:
        QuantError: If the text cannot be read or does not fill one window.
    """
    return _cut(text, text.tokenizer.load(directory))


def _cut(text: Text, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    try:
        content = text.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise QuantError(f"{text.file}: not a readable UTF-8 text file ({e}); give another") from e
    ids: list[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    if text.max_tokens is not None:
        ids = ids[: text.max_tokens + 1]
    cut = list(windows(ids, text.seq_length))
    if not cut:
        raise QuantError(
            f"{text.file}: {len(ids)} tokens do not fill a window of {text.seq_length} and the "
            "label after it; give a longer text or a smaller --seq-length"
        )
    return cut
