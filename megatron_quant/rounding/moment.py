"""Second moments of inputs: a statistic that shows how much an error in a weight matters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TOKENS = 4096
"""Tokens whose products are summed first and then added, whatever the size of a batch."""


@dataclass
class Moments:
    """Sums of x x^T over the tokens of each of E inputs: one, or one an expert.

    Attributes:
        sums: fp32 [E, K, K].
        tokens: Number of tokens, int64 [E] on the host.
    """

    sums: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, inputs: int, cols: int, device: torch.device | None = None) -> "Moments":
        """Return moments of no token yet."""
        sums = torch.zeros(inputs, cols, cols, device=device)
        return cls(sums, torch.zeros(inputs, dtype=torch.int64))

    @property
    def diagonal_EK(self) -> Tensor:
        """Return the sums of squares: fp32 [E, K], a view."""
        return self.sums.diagonal(dim1=1, dim2=2)

    @torch.no_grad()
    def add(self, x_TK: Tensor, splits: Sequence[int]) -> None:
        """Add tokens in their order: fp32 sums of products of their values.

        Args:
            x_TK: bf16, fp16 or fp32, those of the first input first.
            splits: Number of tokens of each input.
        """
        assert len(splits) == len(self.sums) and sum(splits) == len(x_TK), (splits, x_TK.shape)
        for total, part_TK in zip(self.sums, x_TK.split(list(splits)), strict=True):
            for some_TK in part_TK.split(_TOKENS):
                wide = some_TK.float()
                total.addmm_(wide.mT, wide)
        self.tokens += torch.tensor(splits)

    def filled(self, least: int = 1) -> "Moments":
        """Give inputs of fewer than ``least`` tokens (cold experts) the sum over all inputs."""
        cold_E = self.tokens < least
        sums = self.sums.clone()
        sums[cold_E.to(sums.device)] = self.sums.sum(0)
        return Moments(sums, torch.where(cold_E, self.tokens.sum(), self.tokens))


def merged(parts: Sequence[Moments]) -> Moments:
    """Add the moments of all parts, such as ranks, in the order given: equal everywhere."""
    sums, tokens = parts[0].sums.clone(), parts[0].tokens.clone()
    for part in parts[1:]:
        sums += part.sums
        tokens += part.tokens
    return Moments(sums, tokens)
