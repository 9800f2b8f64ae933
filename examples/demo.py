"""Train, quantize, export, verify and compare on one machine without a GPU.

    python examples/demo.py --work-dir out/demo

trains a small Qwen3-MoE (kept for the next run), quantizes it in Megatron at TP=2 EP=2 on four CPU
ranks, exports it and verifies the export. It prints the perplexity, and the KL to bf16, of the
fake-quantized model in Megatron and of the exported checkpoint read back from disk. It exits with 1
if those two perplexities differ by more than one part in a thousand.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TOLERANCE = 1e-3
RANKS = 4
# Megatron and transformers round bf16 in different places. Some activations then land on the other
# side of a quantization step. On so little text that moves a perplexity by a thousandth. fp32 does
# not have this effect.
DTYPE = ("--dtype", "fp32")


def run(*command: str | Path) -> None:
    """Run one step in its own process; end the demo if it fails."""
    words = [sys.executable, *map(str, command)]
    print("\n$ python", *words[1:], flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = subprocess.run(words, env=env).returncode
    if code:
        sys.exit(f"demo: {words[1]} failed with exit status {code}")


def quantize(args: argparse.Namespace, model: Path, export: Path, report: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(RANKS))
    layout = ("--tp", "2", "--ep", "2", "--export-quant-cfg", args.quant_cfg)
    texts = ("--calib-dataset", args.work_dir / "calibration.txt", "--calib-size", "32")
    measured = ("--eval-text", args.work_dir / "heldout.txt", "--report", report)
    weight_only = ("--weight-only",) if args.weight_only else ()
    paths = ("--hf-model-id", model, "--export-dir", export, "--overwrite")
    run(*torchrun, HERE / "quantize.py", *paths, *layout, *DTYPE, *texts, *weight_only, *measured)


def measure(args: argparse.Namespace, model: Path, *against: str | Path) -> dict[str, Any]:
    """Measure a checkpoint on the held-out text; return the figures that ``eval`` writes."""
    figures = args.work_dir / "figures.json"
    text = ("--text", args.work_dir / "heldout.txt")
    run("-m", "megatron_quant", "eval", model, *text, *DTYPE, *against, "--json", figures)
    return json.loads(figures.read_text())


def show(rows: dict[str, dict[str, Any]], title: str = "Held-out text") -> None:
    table = Table("Model", title=title)
    for column in ("Perplexity", "KL to bf16 (nats/token)"):
        table.add_column(column, justify="right")
    for model, row in rows.items():
        kl = "-" if row["kl"] is None else f"{row['kl']:.5f}"
        table.add_row(model, f"{row['perplexity']:.4f}", kl)
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--quant-cfg", default="nvfp4", help="recipe (default: nvfp4)")
    parser.add_argument("--weight-only", action="store_true", help="leave activations as they are")
    parser.add_argument("--steps", help="training steps (default: make_small_moe.py's)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    model, export = args.work_dir / "small-moe", args.work_dir / f"small-moe-{args.quant_cfg}"
    report = args.work_dir / "report.json"
    steps = ("--steps", args.steps) if args.steps else ()
    run(HERE / "make_small_moe.py", "--output-dir", model, *steps)
    quantize(args, model, export, report)
    run("-m", "megatron_quant", "verify", export, "--against", model)
    rows = {
        "bf16": measure(args, model),
        "fake-quantized, in Megatron": json.loads(report.read_text())["fake_quant"],
        "exported checkpoint": measure(args, export, "--against", model),
    }
    show(rows)
    _, fake, exported = (row["perplexity"] for row in rows.values())
    off = abs(fake / exported - 1)
    print(f"Megatron and the exported checkpoint differ by {off:.1e} in perplexity")
    if off > TOLERANCE:
        sys.exit(f"demo: more than {TOLERANCE:.0e}: the export is not what was calibrated")


if __name__ == "__main__":
    main()
