"""Search the blocks' statistics for the least error, one part at a time."""

import torch

from megatron_quant.formats import (
    MULTIPLIERS,
    Format,
    SearchedPiece,
    block_stat,
    choose,
    errors,
    tensor_scale,
)
from megatron_quant.recipes import Decision
from megatron_quant.rounding import importance

_ELEMENTS = 1 << 22
"""Elements searched at a time."""


def searched_stat(
    w_NK: torch.Tensor,
    decision: Decision,
    amax: torch.Tensor | None,
    start: tuple[int, ...],
    squares_K: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Search the statistic of the part's blocks; None if the algorithm takes their amax.

    Args:
        w_NK: Whole blocks of rows, from row ``start[0]`` of the tensor on.
        decision: Format and algorithm.
        amax: Amax of everything that shares the tensor's scale, if the format has one.
        start: Row and column of the tensor at which ``w_NK`` starts.
        squares_K: Sums of squares of the inputs, fp32, by which errors in columns count; None if
            all count alike.
    """
    fmt = decision.weights
    if not decision.searches_blocks:
        return None
    assert fmt is not None and fmt.stat_block is not None
    multipliers = MULTIPLIERS[decision.search]
    weight = None if squares_K is None else importance(squares_K, fmt, decision.slot.name)
    step = max(_ELEMENTS // w_NK.shape[1] // fmt.stat_block[0], 1) * fmt.stat_block[0]
    found = [
        _of_rows(
            rows, fmt, amax, multipliers, SearchedPiece((start[0] + i * step, start[1]), weight)
        )
        for i, rows in enumerate(w_NK.split(step))
    ]
    return torch.cat(found)


def _of_rows(
    w_NK: torch.Tensor,
    fmt: Format,
    amax: torch.Tensor | None,
    multipliers: tuple[float, ...],
    piece: SearchedPiece,
) -> torch.Tensor:
    stat = block_stat(w_NK, fmt, piece.origin)
    dscale = None if amax is None else tensor_scale(amax, fmt) if fmt.tensor_scale else None
    sums = errors(w_NK, fmt, dscale, stat, multipliers, piece)
    return stat * choose(sums, multipliers).unsqueeze(-1)
