"""Measure how fast weights are encoded: GB/s of bf16 input on one CPU thread, beside other tools.

    python -m benchmarks.encode [--write docs/performance.md]

Everything in a row, a copy of the weight included, is measured in turns within one run; the least
CPU seconds count. On a host that also does other work, trust the ratios of a row more than its
numbers.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_quant import cpu

if not torch.cuda.is_available():
    cpu.activate()  # ModelOpt's plugins import Transformer Engine

from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from benchmarks.others import AMAX, COMPRESSED_TENSORS, MODELOPT
from benchmarks.report import Row, Work, host, replace_measured, seconds, table
from megatron_quant.formats import (
    FORMATS,
    amax,
    block_stat,
    encode,
    fake_quant,
    get_format,
    stack_amax,
    tensor_scale,
)
from megatron_quant.native import library


def speeds(work: Sequence[Work | None], w: Tensor, rounds: int) -> Row:
    """Return cells with GB/s of ``w``."""
    taken = seconds(work, rounds)
    return ["-" if t is None else f"{w.nbytes / t / 1e9:.2f}" for t in taken]


def copy_of(w: Tensor) -> Work:
    """Copy the weight: the most that the memory allows."""
    to = torch.empty_like(w)
    return lambda: to.copy_(w)


def own_encode(w: Tensor, name: str) -> Work:
    """Encode with ours, the tensor's scale included."""
    fmt = get_format(name)
    if fmt.tensor_scale:
        return lambda: encode(w, fmt, tensor_scale(amax(w), fmt))
    return lambda: encode(w, fmt, None)


def own_fake_quant(w: Tensor, name: str) -> Work:
    """Fake-quantize with ours, with the tensor's scale known from calibration."""
    fmt = get_format(name)
    dscale = tensor_scale(amax(w), fmt) if fmt.tensor_scale else None
    return lambda: fake_quant(w, fmt, dscale)


def in_torch(work: Work) -> Work:
    """Do ``work`` as a host without the C library does."""

    def run() -> object:
        with patch.object(library, "available", return_value=False):
            return work()

    return run


def amax_rows(w: Tensor, rounds: int) -> list[Row]:
    """Largest magnitudes: copy, ours, ours in torch, ModelOpt."""
    ours: dict[str, Work] = {
        "tensor": lambda: amax(w),
        "channel": lambda: block_stat(w, get_format("fp8_channel")),
        "group of 128": lambda: block_stat(w, get_format("int4")),
        "block of 16": lambda: block_stat(w, get_format("nvfp4")),
    }
    return [
        [name, *speeds([copy_of(w), run, in_torch(run), partial(AMAX[name], w)], w, rounds)]
        for name, run in ours.items()
    ]


def encode_rows(w: Tensor, rounds: int) -> list[Row]:
    """Encoding: copy, ours, ours in torch, ModelOpt, compressed-tensors."""
    rows = []
    for name in FORMATS:
        others = [
            partial(t[name], w) if name in t else None for t in (MODELOPT, COMPRESSED_TENSORS)
        ]
        run = own_encode(w, name)
        rows.append([name, *speeds([copy_of(w), run, in_torch(run), *others], w, rounds)])
    return rows


def fake_quant_rows(w: Tensor, rounds: int) -> list[Row]:
    """Fake quantization: copy, ours, ours in torch."""
    rows = []
    for name in FORMATS:
        run = own_fake_quant(w, name)
        rows.append([name, *speeds([copy_of(w), run, in_torch(run)], w, rounds)])
    return rows


def expert_rows(experts: int, rounds: int) -> list[Row]:
    """FP8 fake quantization of a layer's experts, a scale each: milliseconds and their ratio."""
    return [_expert_row(experts, shape, rounds) for shape in ((16, 64), (128, 512))]


def _expert_row(experts: int, shape: tuple[int, int], rounds: int) -> Row:
    weights = [torch.randn(shape).to(torch.bfloat16) for _ in range(experts)]
    fmt = get_format("fp8")
    dscale = tensor_scale(stack_amax(torch.stack(weights)), fmt)
    quantizers = [TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3))) for _ in weights]
    for quantizer, w in zip(quantizers, weights, strict=True):
        quantizer.amax = w.abs().max().float()
    ours, loop = seconds(
        [
            lambda: fake_quant(torch.stack(weights), fmt, dscale).unbind(0),
            lambda: [one(w) for one, w in zip(quantizers, weights, strict=True)],
        ],
        rounds,
    )
    assert ours is not None and loop is not None
    name = f"{experts} experts [{shape[0]}, {shape[1]}]"
    return [name, f"{ours * 1e3:.2f}", f"{loop * 1e3:.2f}", f"{loop / ours:.0f}x"]


def first_call_row() -> Row:
    """Milliseconds that the very first call of each takes, on a small weight as NVFP4."""
    w = torch.ones(16, 64, dtype=torch.bfloat16)
    others = (partial(t["nvfp4"], w) for t in (MODELOPT, COMPRESSED_TENSORS))
    tools: list[Work] = [own_encode(w, "nvfp4"), *others]
    taken = []
    for run in tools:
        start = time.thread_time()
        run()
        taken.append(time.thread_time() - start)
    return ["first call, ms", *(f"{t * 1e3:.1f}" for t in taken)]


def measure(mib: int, rounds: int, experts: int) -> str:
    """All tables, in Markdown."""
    torch.set_num_threads(1)
    first = first_call_row()
    w = (torch.randn(mib * 128, 4096) * 0.02).to(torch.bfloat16)
    tools = f"ModelOpt {version('nvidia-modelopt')}"
    packers = f"{tools}|compressed-tensors {version('compressed-tensors')}"
    about = (
        f"One thread of {host()}; torch {torch.__version__.partition('+')[0]}; a bf16 weight of "
        f"{mib} MiB; GB/s of that input from the least CPU time of {rounds} turns."
    )
    parts = [
        about,
        table("Encoding:", f"format|copy|ours|ours, no library|{packers}", encode_rows(w, rounds)),
        table("Statistics:", f"amax per|copy|ours|ours, no library|{tools}", amax_rows(w, rounds)),
        table(
            "Fake quantization:", "format|copy|ours|ours, no library", fake_quant_rows(w, rounds)
        ),
        table(
            "FP8 fake quantization of a layer's experts, each with its scale, in milliseconds:",
            f"experts|ours, one stack|{tools}, a quantizer each|ratio",
            expert_rows(experts, rounds),
        ),
        table("Once a process (NVFP4, a small weight):", f"|ours|{packers}", [first]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print, and write where told to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=16, help="size of the bf16 weight (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row (default 5)")
    parser.add_argument("--experts", type=int, default=128, help="experts of a layer (default 128)")
    parser.add_argument("--write", type=Path, help="file whose measured part is replaced")
    args = parser.parse_args()
    measured = measure(args.mib, args.rounds, args.experts)
    print(measured)
    if args.write:
        replace_measured(args.write, measured)


if __name__ == "__main__":
    main()
