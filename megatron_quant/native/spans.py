"""Where the blocks of a logical tensor lie in a piece of it.

A piece starts at ``origin``, a row and a column of the logical tensor. Blocks are counted from the
logical tensor's first element, so the first and the last block that a piece touches may lie in it
only in part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_quant.native.sizes import WHOLE

Origin = tuple[int, int]


@dataclass(frozen=True)
class Cuts:
    """One dim of a piece, cut into blocks.

    length: elements of the piece. block: elements of a block. first: elements of the first block
    that lie before the piece. count: blocks that the piece touches.
    """

    length: int
    block: int
    first: int
    count: int

    @classmethod
    def of(cls, length: int, block: int, origin: int) -> "Cuts":
        """``length`` elements from ``origin`` on, in blocks of ``block`` (or ``WHOLE``: one)."""
        if block == WHOLE:
            return cls(length, max(length, 1), 0, 1)
        if length == 0:
            return cls(0, block, 0, 0)
        first = origin % block
        return cls(length, block, first, -(-(first + length) // block))

    @property
    def _padding(self) -> tuple[int, int]:
        return self.first, self.count * self.block - self.first - self.length

    def split(self, x_RK: Tensor) -> Tensor:
        """[R, length] -> [R, count, block], parts of blocks filled up with zeros."""
        if any(self._padding):
            x_RK = pad(x_RK, self._padding)
        return x_RK.view(x_RK.shape[0], self.count, self.block)

    def join(self, x_RBb: Tensor) -> Tensor:
        """[R, count, block] -> [R, length], contiguous: the inverse of :meth:`split`."""
        x_RK = x_RBb.view(x_RBb.shape[0], self.count * self.block)
        return x_RK[:, self.first : self.first + self.length].contiguous()

    def gather(self, x_ENB: Tensor) -> Tensor:
        """Rows by block: [E, length, ...] -> [E, count, block, ...], filled up with zeros."""
        padded = pad(x_ENB, (0, 0) * (x_ENB.dim() - 2) + self._padding)
        return padded.unflatten(1, (self.count, self.block))

    def index(self, copies: int, device: torch.device) -> Tensor:
        """Block of each of ``copies`` x ``length`` elements, counted through: int64."""
        one = (torch.arange(self.length, device=device) + self.first) // self.block
        return (one + self.count * torch.arange(copies, device=device)[:, None]).view(-1)
