"""The Triton loops on the CPU, in Triton's interpreter, against torch: exits with 0 if all agree.

    TRITON_INTERPRET=1 python -m tests.unit.interpreted_loops

A process of its own: Triton reads the variable when its own functions are defined.
"""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

from megatron_quant.formats import block_stat, encode, fake_quant, stack_amax, tensor_scale
from megatron_quant.formats.backends import gpu
from tests.unit.test_formats_native import ALL, INPUTS, random, same_bits, scales

# One program does what many would: the interpreter's cost is by the operation.
gpu._TILE = 1 << 16
_INPUTS = {name: INPUTS[name] for name in ("every", "ties", "near zero")}
_USERS = (
    *("numbers.absmax", "numbers.arithmetic", "blocks.chunks", "blocks.rows", "blocks.stat"),
    *("codec", "quantize_dequantize"),
)


def main() -> int:
    wrong = [name for name, call in cases() if not agree(call)]
    print(f"{len(wrong)} wrong of {sum(1 for _ in cases())}", *wrong, sep="\n")
    return int(bool(wrong))


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for fmt in ALL:
        for name, x in _INPUTS.items():
            for dscale in scales(x, fmt)[::3]:
                yield f"{fmt.name} encode {name}", lambda a=(x, fmt, dscale): encode(*a)
                yield f"{fmt.name} fake {name}", lambda a=(x, fmt, dscale): fake_quant(*a)
            if fmt.stat_block:
                yield f"{fmt.name} statistic {name}", lambda a=(x, fmt): block_stat(*a)
        if fmt.stat_block:
            yield from of_pieces(fmt)
    for name, x in _INPUTS.items():
        yield f"amax {name}", lambda x=x: stack_amax(x.unsqueeze(0))


def of_pieces(fmt: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Blocks that an edge cuts; rows that are no power of two; a scale for each matrix."""
    for origin, cols in (((3, 8), 136), ((127, 376), 1152)):
        x = random(2 * 6, cols).view(2, 6, cols)
        stat = block_stat(x, fmt, origin) * 1.5
        dscale = tensor_scale(stack_amax(x), fmt) if fmt.tensor_scale else None
        a = (x, fmt, dscale, stat, origin)
        yield f"{fmt.name} encode from {origin}", lambda a=a: encode(*a)
        yield f"{fmt.name} fake from {origin}", lambda a=a: fake_quant(*a)
        yield f"{fmt.name} statistic from {origin}", lambda a=(x, fmt, origin): block_stat(*a)


def agree(call: Callable[[], Any]) -> bool:
    results = []
    for loops in (gpu, None):
        for name in _USERS:
            import_module(f"megatron_quant.formats.{name}").loops_for = serve(loops)
        results.append(call())
    with_loops, in_torch = results
    if isinstance(in_torch, torch.Tensor) and in_torch.dtype == torch.float32:
        return torch.equal(with_loops, in_torch)  # the sign of a zero counts in no statistic
    return same_bits((with_loops, in_torch))


def serve(loops: Any) -> Callable[[torch.Tensor], Any]:
    return lambda x: loops if x.dtype == torch.bfloat16 and x.numel() else None


if __name__ == "__main__":
    sys.exit(main())
