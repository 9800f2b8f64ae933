"""The gradient of a loss by the scales of blocks: learned step sizes (Esser et al. 2020)."""

import torch
from torch import Tensor

from megatron_quant.formats import Format
from megatron_quant.native import Cuts


@torch.no_grad()
def scale_gradient(
    w: Tensor, rounded: Tensor, end: Tensor, grad: Tensor, fmt: Format, first: int = 0
) -> Tensor:
    """Return the gradient by the logarithm of each block's scale: fp32 [E, N, K_b].

    It is the sum over the block of ``g (q - w)``, and of ``g q`` where the value saturates.

    Args:
        w: The weights [E, N, K].
        rounded: Their values q on the grid.
        end: The values of largest magnitude that the grid has on their side of 0.
        grad: Gradient g by the rounded weights.
        fmt: A format whose blocks have one row.
        first: Column of the logical tensor at which ``w`` starts.
    """
    assert fmt.stat_block is not None and fmt.stat_block[0] == 1, fmt.name
    saturated = (rounded == end) & (w.abs() > rounded.abs())
    moved = rounded.float() - w.float().masked_fill(saturated, 0.0)
    product_RK = (grad.float() * moved).flatten(0, 1)
    columns = Cuts.of(w.shape[-1], fmt.stat_block[1], first)
    return columns.split(product_RK).sum(-1).view(*w.shape[:2], -1)
