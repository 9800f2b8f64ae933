"""All formats, and the references that their tests compare with."""

from itertools import pairwise, product

import pytest
import torch

from megatron_quant.formats import FORMATS, stack_amax, tensor_scale
from megatron_quant.formats.numbers.arithmetic import kernel_of
from megatron_quant.formats.spec import CHANNEL, GROUP_SIZES, stored_format

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GROUPED = [stored_format(name, size) for name, sizes in GROUP_SIZES.items() for size in sizes]
ALL = [fmt for name, fmt in FORMATS.items() if name not in GROUP_SIZES] + GROUPED
BLOCKED = [fmt for fmt in ALL if fmt.stat_block]


def label(fmt):
    size = "channel" if fmt.group_size == CHANNEL else fmt.group_size
    return f"{fmt.name}-{size}"


every_format = pytest.mark.parametrize("fmt", ALL, ids=label)
every_blocked_format = pytest.mark.parametrize("fmt", BLOCKED, ids=label)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def scale_of(stack, fmt):
    """The scale of each matrix of [E, N, K], where the format has one."""
    return tensor_scale(stack_amax(stack), fmt) if fmt.tensor_scale else None


def bits(t):
    """The tensor's bytes: equal bits, not equal values."""
    return t.contiguous().view(-1).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def weights(*shape, dtype=torch.bfloat16, seed=0):
    """Normal values with zeros of both signs, outliers and tiny ones among them."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    flat = w.view(-1)
    flat[::7], flat[1::7], flat[2::31], flat[3::131] = 0.0, -0.0, 0.6, -1e-6
    return w.to(dtype)


ROWS, COLS = 300, 416  # 128 leaves a tail in both


def random_edges(length, multiple, gen):
    """0, a few cuts at multiples of ``multiple``, and ``length``."""
    number = int(torch.randint(1, 7, (), generator=gen))
    cuts = torch.randint(1, length // multiple, (number,), generator=gen) * multiple
    return sorted({0, length, *cuts.tolist()})


def pieces(fmt, seed):
    """Boxes (rows, cols) that cover the logical tensor."""
    gen = torch.Generator().manual_seed(seed)
    rows = random_edges(ROWS, 1, gen)
    cols = random_edges(COLS, kernel_of(fmt).element.packed, gen)
    return [(slice(*r), slice(*c)) for r, c in product(pairwise(rows), pairwise(cols))]


def cells(block, box):
    """Slices of the grid of ``block`` that ``box`` of the logical tensor touches."""
    return tuple(
        slice(part.start // size, -(-part.stop // size)) if size else slice(0, 1)
        for size, part in zip(block, box, strict=True)
    )
