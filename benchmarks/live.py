"""Export a live model that tensor parallelism cuts, against torch's distributed checkpoint.

``HuggingFaceStorageWriter`` with consolidation writes only bf16. So do we in one row; the others
are quantized. Each run has its own ranks. Only the export is measured, without verifying.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.checkpoint import gigabytes_of, make_checkpoint
from benchmarks.exporters import FORMATS
from benchmarks.report import host, replace_measured, table

_HEADER = "GB|what|CPU s, all ranks|of DCP|wall s|peak RSS of a rank, GB"
_RUNS = [("DCP", "bf16"), ("ours", "bf16"), *(("ours", fmt) for fmt in FORMATS)]
_DENSE = """rules:
  - quantize: ["*layers.0.self_attn.[qkv]_proj"]
    weights: fp8
  - exclude: ["*self_attn*", "*mlp*"]
"""
"""A recipe must quantize something: this one quantizes a thousandth of the weights."""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the parser."""
    p = verbs.add_parser("live", help="a live model at TP and ETP 4, against torch's writer")
    p.add_argument("--gb", type=float, default=0.25)
    p.add_argument("--ranks", type=int, default=4, help="also --tp and --etp")
    p.add_argument("--turns", type=int, default=1)
    p.add_argument("--folder", type=Path, help="where checkpoints are made (default: temporary)")
    p.add_argument("--write", type=Path, help="page whose part measured here is replaced")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source = make_checkpoint(folder / "source", args.gb)
        (folder / "dense.yaml").write_text(_DENSE)
        found: dict[tuple[str, str], list[dict[str, float]]] = {each: [] for each in _RUNS}
        for _ in range(args.turns):
            for each in _RUNS:
                found[each].append(_measure(*each, args.ranks, folder))
                print(each, found[each][-1], file=sys.stderr, flush=True)
        size = gigabytes_of(source)
    base = median(t["cpu"] for t in found["DCP", "bf16"])
    rows = [_row(size, f"{fmt} {tool}", took, base) for (tool, fmt), took in found.items()]
    title = f"TP {args.ranks}, ETP {args.ranks}, a thread a rank, of {host()}; "
    measured = table(f"{title}torch {torch.__version__}; medians of {args.turns}.", _HEADER, rows)
    print(measured)
    if args.write:
        replace_measured(args.write, measured, "live")


def _row(size: float, name: str, took: list[dict[str, float]], base: float) -> list[str]:
    cpu, wall, rss = (median(t[key] for t in took) for key in ("cpu", "wall", "rss"))
    return [
        f"{size:.2f}",
        name,
        f"{cpu:.2f}",
        f"{cpu / base:.2f}x",
        f"{wall:.2f}",
        f"{rss / 1e9:.2f}",
    ]


def _measure(tool: str, fmt: str, ranks: int, folder: Path) -> dict[str, float]:
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    argv += ["-m", "benchmarks.live_ranks", tool, fmt, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, env=env, check=True)
    shutil.rmtree(folder / "out")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
