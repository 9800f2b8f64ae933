"""Measure streaming export against a plain copy and other exporters, in interleaved turns.

Every run is its own process with one thread. It does the work three times, and the least counts;
of several runs (--turns) the median counts. CPU and wall seconds are those of the work alone. What
a process does once (imports, compilation; measured with the smallest checkpoint) and verifying have
their own columns. Memory is the process's peak.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.checkpoint import gigabytes_of, make_checkpoint, make_smallest
from benchmarks.exporters import FORMATS
from benchmarks.report import host, replace_measured, table

_TOOLS = {
    "ours": "megatron_quant",
    "ModelOpt": "modelopt",
    "model_free_ptq": "llmcompressor",
}
"""Tool -> the module that it needs."""
_HEADER = "GB|what|CPU s|of copy|wall s|peak RSS, GB|first call, CPU s|verify, CPU s"
_ROOT = Path(__file__).parents[1]


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the parser."""
    p = verbs.add_parser("stream", help="file to file, against a copy and against other exporters")
    p.add_argument("--gb", type=float, default=0.25, help="of the smallest checkpoint")
    p.add_argument("--sizes", type=int, nargs="*", default=[1, 2], help="its multiples")
    p.add_argument("--others-up-to", type=int, default=1, help="largest multiple for other tools")
    p.add_argument(
        "--experts", type=int, nargs="*", default=[2], help="multiples of 16, in the same bytes"
    )
    p.add_argument("--ranks", type=int, nargs="*", default=[2], help="how many share the work")
    p.add_argument("--turns", type=int, default=1)
    p.add_argument("--tools", nargs="*", default=list(_TOOLS), choices=list(_TOOLS))
    p.add_argument("--llm-compressor", type=Path, help="folder that pip --target installed it to")
    p.add_argument("--folder", type=Path, help="where checkpoints are made (default: temporary)")
    p.add_argument("--write", type=Path, help="page whose part measured here is replaced")
    p.set_defaults(run=run)


@dataclass(frozen=True)
class Run:
    """One line of the table: a tool, a format and a number of ranks."""

    tool: str
    fmt: str = ""
    ranks: int = 1

    @property
    def name(self) -> str:
        """Return its name in the table."""
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.fmt} {self.tool}".strip() + ranks


class Machine:
    """Starts runs. others: the folder of llm-compressor, which needs its own libraries."""

    def __init__(self, folder: Path, others: Path | None) -> None:
        self._folder, self._others = folder, others
        self.smallest = make_smallest(folder / "smallest")

    def lacks(self, tool: str) -> str:
        """Return the last line of why the tool cannot be imported; empty if it can."""
        done = self._start(tool, ["-c", f"import {_TOOLS[tool]}"])
        return _last_line(done.stderr) if done.returncode else ""

    def measure(self, run: Run, source: Path) -> dict[str, float] | str:
        """Return what one run took, or the last line of why it failed."""
        out = self._folder / "out"
        launch = ["-m", "benchmarks.exporters"]
        if run.ranks > 1:
            launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(run.ranks), *launch]
        paths = [str(path) for path in (source, self.smallest, out)]
        done = self._start(run.tool, [*launch, run.tool, run.fmt, *paths])
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name("first"), ignore_errors=True)
        if done.returncode:
            return _last_line(done.stderr)
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def _start(self, tool: str, argv: list[str]) -> "subprocess.CompletedProcess[str]":
        path = [str(_ROOT)]
        if tool == "model_free_ptq" and self._others is not None:
            path.insert(0, str(self._others))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
        command = [sys.executable, *argv]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:100]


def compare(machine: Machine, source: Path, runs: list[Run], turns: int) -> Iterator[list[str]]:
    """Yield rows of one checkpoint: each turn does every run once. Ratios are to the first run."""
    found: dict[Run, list[dict[str, float]]] = {run: [] for run in runs}
    failed: dict[Run, str] = {}
    for _ in range(turns):
        for run in runs:
            took = machine.measure(run, source)
            if isinstance(took, str):
                failed[run] = took
            else:
                found[run].append(took)
            print(run, took, file=sys.stderr, flush=True)
    size = f"{gigabytes_of(source):.2f}"
    for run, took in found.items():
        if run in failed:
            yield [size, run.name, f"fails: {failed[run]}", *[""] * 5]
        else:
            yield [size, run.name, *_figures(took, _median(found[runs[0]], "cpu"))]


def _figures(took: list[dict[str, float]], base: float) -> list[str]:
    cpu, verify = _median(took, "cpu"), _median(took, "verify")
    return [
        f"{cpu:.2f}",
        f"{cpu / base:.2f}x",
        f"{_median(took, 'wall'):.2f}",
        f"{_median(took, 'rss') / 1e9:.2f}",
        f"{_median(took, 'first'):.1f}",
        f"{verify:.2f}" if verify else "-",
    ]


def _median(took: list[dict[str, float]], key: str) -> float:
    return median(t[key] for t in took) if took else float("nan")


def run(args: argparse.Namespace) -> None:
    """Measure and print the tables."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        machine = Machine(Path(folder), args.llm_compressor)
        tools = []
        for tool in args.tools:
            if lacking := machine.lacks(tool):
                print(f"{tool}: left out, not found ({lacking})")
            else:
                tools.append(tool)
        measured = "\n\n".join(_tables(args, machine, tools, Path(folder)))
    print(measured)
    if args.write:
        replace_measured(args.write, measured, "export")


def _tables(
    args: argparse.Namespace, machine: Machine, tools: list[str], folder: Path
) -> Iterator[str]:
    about = f"One thread of {host()}; torch {torch.__version__}."
    if args.sizes:
        rows = [
            row for factor in args.sizes for row in _of_size(args, machine, tools, factor, folder)
        ]
        yield table(f"{about} How it grows with the checkpoint:", _HEADER, rows)
    if args.experts:
        rows = [
            row for factor in args.experts for row in _of_experts(args, machine, factor, folder)
        ]
        yield table("The same bytes in more experts:", _HEADER, rows)
    if args.ranks:
        runs = [_COPY, *(Run("ours", fmt, ranks) for ranks in args.ranks for fmt in FORMATS)]
        rows = _of(machine, folder, args.gb, 1, runs, args.turns)
        about = "Ranks that share the work; CPU seconds of all of them, memory of the largest:"
        yield table(about, _HEADER, rows)


_COPY = Run("copy")


def _of_size(
    args: argparse.Namespace, machine: Machine, tools: list[str], factor: int, folder: Path
) -> list[list[str]]:
    chosen = tools if factor <= args.others_up_to else [t for t in tools if t == "ours"]
    runs = [_COPY, *(Run(tool, fmt) for fmt in FORMATS for tool in chosen)]
    return _of(machine, folder, args.gb * factor, 1, runs, args.turns)


def _of_experts(
    args: argparse.Namespace, machine: Machine, factor: int, folder: Path
) -> list[list[str]]:
    runs = [_COPY, *(Run("ours", fmt) for fmt in FORMATS)]
    rows = _of(machine, folder, args.gb, factor, runs, args.turns)
    return [[row[0], f"{row[1]}, {16 * factor} experts", *row[2:]] for row in rows]


def _of(
    machine: Machine, folder: Path, gigabytes: float, experts: int, runs: list[Run], turns: int
) -> list[list[str]]:
    source = make_checkpoint(folder / "source", gigabytes, experts)
    try:
        return list(compare(machine, source, runs, turns))
    finally:
        shutil.rmtree(source)
