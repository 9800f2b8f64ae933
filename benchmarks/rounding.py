"""Measure what GPTQ takes, by experts, rows, columns and tokens: sums of products, and rounding.

    python -m benchmarks.rounding

Each case runs in its own process, so that its memory can be measured.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import host, replace_measured, table
from megatron_quant.formats import get_format, scales_of
from megatron_quant.rounding import Moments, gptq

_FORMAT = "int4"
_MB = 1e6
_HEADER = "experts|rows|inputs|tokens|summing, CPU s|rounding, CPU s|a weight, us|peak, MB"


@dataclass(frozen=True)
class Case:
    """A layer of ``experts`` matrices [rows, cols] that share ``tokens`` tokens."""

    experts: int
    rows: int
    cols: int
    tokens: int


CASES = (
    Case(1, 1024, 512, 4096),
    Case(1, 1024, 1024, 4096),
    Case(1, 1024, 2048, 4096),
    Case(1, 2048, 1024, 4096),
    Case(1, 1024, 1024, 16384),
    Case(8, 1024, 512, 4096),
    Case(128, 1024, 512, 4096),
)


def figures(case: Case) -> dict[str, float]:
    """Return CPU seconds of both steps, and the peak of memory above that of the imports."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = torch.Generator().manual_seed(0)
    fmt, shape = get_format(_FORMAT), (case.experts, case.rows, case.cols)
    w_ENK = torch.randn(shape, generator=generator).bfloat16()
    x_TK = torch.randn(case.tokens, case.cols, generator=generator).bfloat16()
    start = time.thread_time()
    moments = Moments.of(case.experts, case.cols)
    moments.add(x_TK, [case.tokens // case.experts] * case.experts)
    summed = time.thread_time()
    gptq(w_ENK, fmt, scales_of(w_ENK, fmt, None), moments.sums)
    done = time.thread_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"sum": summed - start, "round": done - summed, "peak": (peak - before) * 1024 / _MB}


def _apart(case: Case) -> dict[str, float]:
    sizes = (case.experts, case.rows, case.cols, case.tokens)
    argv = [sys.executable, "-m", "benchmarks.rounding", "--one", *map(str, sizes)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _row(case: Case) -> list[str]:
    found = _apart(case)
    each = found["round"] / (case.experts * case.rows * case.cols) * 1e6
    sizes = (case.experts, case.rows, case.cols, case.tokens)
    times = (f"{found['sum']:.2f}", f"{found['round']:.2f}", f"{each:.2f}", f"{found['peak']:.0f}")
    return [*map(str, sizes), *times]


def main() -> None:
    """Print the table, write it into a page, or print the figures of one case as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="put the table into this page")
    parser.add_argument("--one", nargs=4, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(figures(Case(*args.one))))
        return
    title = f"GPTQ to {_FORMAT}, one thread of {host()}; all experts share the tokens:"
    found = table(title, _HEADER, [_row(case) for case in CASES])
    print(found)
    if args.write:
        replace_measured(args.write, found, "rounding")


if __name__ == "__main__":
    main()
