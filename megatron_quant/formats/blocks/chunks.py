"""A tensor as rows, cut into pieces whose temporaries stay in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_quant.formats.backends import loops_for

_ELEMENTS = 1 << 18
"""Size of a chunk per CPU thread: it fits the cache, and calls into torch still cost little."""


def as_rows(x: Tensor) -> Tensor:
    """Flatten [..., K] to [R, K], contiguous; a view where ``x`` is contiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def row_chunks(x_RK: Tensor) -> Iterator[slice]:
    """Cut the rows of ``x_RK`` into slices: one on an accelerator, cache-sized ones on a CPU."""
    rows, cols = x_RK.shape
    step = rows
    if x_RK.device.type == "cpu":
        step = _ELEMENTS * torch.get_num_threads() // max(cols, 1)
    step = max(step, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def chunks_to_read(x_RK: Tensor) -> Iterator[slice]:
    """Cut rows for a statistic: all at once where compiled loops take them, else ``row_chunks``."""
    return iter([slice(None)]) if loops_for(x_RK) is not None else row_chunks(x_RK)
