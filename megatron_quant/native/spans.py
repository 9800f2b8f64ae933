"""Where the blocks of a logical tensor lie in a piece of it.

A piece starts at ``origin``, a row and a column of the logical tensor. Blocks are counted from the
logical tensor's first element. So the piece may hold only parts of its first and its last block.
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

    Attributes:
        length: Elements of the piece.
        block: Elements of a block.
        first: Elements of the first block that lie before the piece.
        count: Blocks that the piece touches.
    """

    length: int
    block: int
    first: int
    count: int

    @classmethod
    def of(cls, length: int, block: int, origin: int) -> "Cuts":
        """Cut ``length`` elements from ``origin`` on into blocks of ``block`` (``WHOLE``: one)."""
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
        """Split [R, length] into [R, count, block]; zeros fill up partial blocks."""
        if any(self._padding):
            x_RK = pad(x_RK, self._padding)
        return x_RK.view(x_RK.shape[0], self.count, self.block)

    def join(self, x_RBb: Tensor) -> Tensor:
        """Undo :meth:`split`: [R, count, block] -> [R, length], contiguous."""
        x_RK = x_RBb.view(x_RBb.shape[0], self.count * self.block)
        return x_RK[:, self.first : self.first + self.length].contiguous()

    def gather(self, x_ENB: Tensor) -> Tensor:
        """Gather rows by block: [E, length, ...] -> [E, count, block, ...], filled with zeros."""
        padded = pad(x_ENB, (0, 0) * (x_ENB.dim() - 2) + self._padding)
        blocks: Tensor = padded.unflatten(1, (self.count, self.block))
        return blocks

    def index(self, copies: int, device: torch.device) -> Tensor:
        """Return the block of each of ``copies`` x ``length`` elements, counted through: int64."""
        one = (torch.arange(self.length, device=device) + self.first) // self.block
        return (one + self.count * torch.arange(copies, device=device)[:, None]).view(-1)
