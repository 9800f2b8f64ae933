"""What GPTQ of a whole model takes, a layer of it: ours by --stream, and llm-compressor's beside.

    python -m benchmarks.gptq_cost --model out/demo/small-moe \
        --calibration out/demo/calibration.txt --llm-compressor PYTHON

Each run has a process of its own; they take turns, and the least of each counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import megatron_quant as mq
from benchmarks.report import host, replace_measured, table
from megatron_quant.streaming import Walk  # its imports count for nobody

_OTHER = Path(__file__).with_name("accuracy_llm_compressor.py")
_SCHEMES = {"int4": "W4A16", "w4a16_nvfp4": "NVFP4A16"}
"""Recipe -> the scheme of llm-compressor that stores the same."""
_HEADER = (
    "weights|by|calibration and rounding, CPU s|a layer|of llm-compressor's|imports, MB|"
    "peak above them, MB|of llm-compressor's"
)
_MB = 1e6

Figures = dict[str, float]


def peak() -> float:
    """Return the most memory that this process has held, in MB.

    Not ``ru_maxrss``, which starts with what the process that started this one has held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / _MB for line in lines if line.startswith("VmHWM"))


def _one(recipe: str, model: str, text: str, out: str, samples: str) -> None:
    """Quantize, in a process of its own, and print its figures."""
    assert Walk, "imported"
    torch.set_num_threads(1)
    held, before = peak(), time.process_time()
    calibration = mq.Calibration(dataset=text, size=int(samples), cold_experts="layer-max")
    options = {"format": "compressed-tensors", "calibration": calibration, "algorithm": "gptq"}
    mq.stream(model, recipe, out, **options)
    found = {"seconds": time.process_time() - before, "peak": peak() - held, "imports": held}
    print(json.dumps(found))


def _run(command: list[str]) -> Figures:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise SystemExit(f"{command[1]} failed: {lines[-1]}")
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def _rows(args: argparse.Namespace, recipe: str, layers: int) -> list[list[str]]:
    ours: list[Figures] = []
    theirs: list[Figures] = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as work:
            data = [str(args.model), str(args.calibration)]
            rest = [f"{work}/ours", str(args.calib_size)]
            own = [sys.executable, "-m", "benchmarks.gptq_cost", "--one", recipe, *data, *rest]
            ours.append(_run(own))
            if args.llm_compressor is not None:
                words = [_SCHEMES[recipe], "GPTQ", *data, f"{work}/theirs", str(args.calib_size)]
                theirs.append(_run([str(args.llm_compressor), str(_OTHER), *words]))
    rows = []
    best = _least(theirs) if theirs else {}
    for name, found in (("ours", _least(ours)), ("llm-compressor", best)):
        if found:
            taken, held, imports = (found[key] for key in ("seconds", "peak", "imports"))
            times = (f"{taken:.1f}", f"{taken / layers:.2f}", _share(found, best, "seconds"))
            memory = (f"{imports:.0f}", f"{held:.0f}", _share(found, best, "peak"))
            rows.append([recipe, name, *times, *memory])
    return rows


def _least(found: list[Figures]) -> Figures:
    return {key: min(f[key] for f in found) for key in found[0]}


def _share(found: Figures, best: Figures, key: str) -> str:
    return f"{found[key] / best[key]:.2f}" if best else "-"


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint")
    parser.add_argument("--calibration", type=Path, help="text")
    parser.add_argument("--calib-size", type=int, default=128, help="samples of 512 tokens")
    parser.add_argument("--llm-compressor", type=Path, help="Python of an environment that has it")
    parser.add_argument("--rounds", type=int, default=2, help="how often each runs")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        _one(*args.one)
        return
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    rows = [row for recipe in _SCHEMES for row in _rows(args, recipe, layers)]
    title = (
        f"GPTQ of {args.model.name}, {layers} layers, {args.calib_size} samples of 512 tokens, one "
        f"thread of {host()}:"
    )
    found = table(title, _HEADER, rows)
    print(found)
    if args.write:
        replace_measured(args.write, found, "gptq")


if __name__ == "__main__":
    main()
