"""Perplexity and divergence of a language model, as pure functions of ids and logits.

Every evaluation (transformers in one process, Megatron on many ranks) cuts the text and sums the
losses here. So their figures differ only by the models.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of windows, in nats."""

    nll: float
    kl: float
    tokens: int

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.nll + other.nll, self.kl + other.kl, self.tokens + other.tokens)

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative log likelihood per predicted token."""
        return math.exp(self.nll / self.tokens)

    @property
    def mean_kl(self) -> float:
        """Return the mean KL(reference || model) per predicted token."""
        return self.kl / self.tokens


NOTHING = Sums(0.0, 0.0, 0)


def windows(ids: Sequence[int], seq_length: int) -> Iterator[torch.Tensor]:
    """Cut ``ids`` into windows that do not overlap: int64 [seq_length + 1], inputs and labels.

    ``w[:-1]`` are a forward's ``seq_length`` inputs and ``w[1:]`` its labels. Consecutive windows
    share one id, so every id but the first is predicted once. A shorter tail is dropped.
    """
    assert seq_length > 0
    stream = torch.as_tensor(ids, dtype=torch.int64)
    for start in range(0, len(stream) - seq_length, seq_length):
        yield stream[start : start + seq_length + 1]


@dataclass(frozen=True)
class Losses:
    """Losses of tokens in nats, fp64 [tokens] each.

    Attributes:
        nll_T: -log p(label).
        kl_T: KL(reference || model); 0 without a reference.
    """

    nll_T: torch.Tensor
    kl_T: torch.Tensor

    @property
    def sums(self) -> Sums:
        """Return the sums over all tokens."""
        return Sums(self.nll_T.sum().item(), self.kl_T.sum().item(), len(self.nll_T))


def token_losses(
    logits_TV: torch.Tensor, ref_logits_TV: torch.Tensor | None, labels_T: torch.Tensor
) -> Losses:
    """Return -log p(label) and KL(reference || model) of each token.

    Args:
        logits_TV: [tokens, vocabulary] of any float type. The log-softmax is taken in fp32.
        ref_logits_TV: Logits of the reference.
        labels_T: int64 [tokens].
    """
    logp_TV = F.log_softmax(logits_TV.float(), dim=-1)
    nll_T = -logp_TV.gather(-1, labels_T[:, None])[:, 0].double()
    kl_T = torch.zeros_like(nll_T)
    if ref_logits_TV is not None:
        ref_TV = F.log_softmax(ref_logits_TV.float(), dim=-1)
        kl_T = (ref_TV.exp() * (ref_TV - logp_TV)).sum(-1, dtype=torch.float64)
    return Losses(nll_T, kl_T)


def nll_and_kl(
    logits_TV: torch.Tensor, ref_logits_TV: torch.Tensor | None, labels_T: torch.Tensor
) -> Sums:
    """Return the sums of :func:`token_losses` over all tokens."""
    return token_losses(logits_TV, ref_logits_TV, labels_T).sums
