"""The statistic of every block, from which its scale follows."""

from functools import lru_cache

import torch
from torch import Tensor

from megatron_quant.formats.backends import loops_for
from megatron_quant.formats.blocks.chunks import as_rows, chunks_to_read
from megatron_quant.formats.numbers import check_dtype, last_dim_amax
from megatron_quant.formats.spec import Format
from megatron_quant.native import WHOLE, Cuts, Origin


@lru_cache(maxsize=4096)
def cuts(shape: tuple[int, ...], fmt: Format, origin: Origin) -> tuple[Cuts, Cuts]:
    """Cut the rows and the columns of a piece [..., N, K] or [K] into blocks of ``stat_block``.

    A format without blocks counts as one with a block a row.
    """
    rows, cols = fmt.stat_block or (1, WHOLE)
    length = shape[-2] if len(shape) > 1 else 1
    return Cuts.of(length, rows, origin[0]), Cuts.of(shape[-1], cols, origin[1])


def row_stat(x_RK: Tensor, columns: Cuts, parts: int) -> Tensor:
    """Return the statistic of each row's part of each block: [R, K] -> fp32 [R, B, parts].

    No number of it is negative.

    Args:
        x_RK: Values of the rows.
        columns: How blocks lie along K.
        parts: 1 for max |x|; 2 for (max(x, 0), max(-x, 0)), which formats with a zero point or
            signed scales need.
    """
    x_RBb = columns.split(x_RK)
    if parts == 1:
        return last_dim_amax(x_RBb).unsqueeze(-1)
    loops = loops_for(x_RK)
    if loops is not None:
        return loops.block_ends(x_RK, columns.block, columns.first)
    low, high = torch.aminmax(x_RBb, dim=-1)
    return torch.stack((high, -low), -1).float().clamp_(min=0)


@torch.no_grad()
def block_stat(w: Tensor, fmt: Format, origin: Origin = (0, 0)) -> Tensor:
    """Return the statistic of every block of the logical tensor's grid that ``w`` touches.

    Statistics of pieces of one block merge by maximum. NaN and Inf propagate.

    Args:
        w: bf16, fp16 or fp32 [..., N, K] or [K]; its first element (of each matrix) is element
            ``origin`` of the logical tensor.
        fmt: A format with blocks (``fmt.stat_block``).
        origin: Row and column of the logical tensor at which ``w`` starts.

    Returns:
        fp32 [..., N_b, K_b, P]. P = 1: max |w|. P = 2, with a zero point or signed scales:
        (max(w, 0), max(-w, 0)). An empty piece has 0. A block that an edge of ``w`` cuts
        has the statistic of its part in ``w``.

    Raises:
        FormatError: For another dtype.
    """
    check_dtype(w)
    assert fmt.stat_block is not None, f"{fmt.name} has a scale per tensor alone"
    parts = fmt.stat_parts
    rows, columns = cuts(w.shape, fmt, origin)
    w_RK = as_rows(w)
    stat = w_RK.new_empty(w_RK.shape[0], columns.count, parts, dtype=torch.float32)
    for chunk in chunks_to_read(w_RK):
        stat[chunk] = row_stat(w_RK[chunk], columns, parts)
    if rows.block > 1:
        stat = rows.gather(stat.view(w.shape[:-2].numel(), rows.length, columns.count, parts)).amax(
            2
        )
    leading = (*w.shape[:-2], rows.count) if w.dim() > 1 else ()
    return stat.view(*leading, columns.count, parts)
