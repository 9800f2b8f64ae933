"""Show what training through the quantizers gains over calibration alone, without a GPU.

    python examples/demo_qat.py --work-dir out/demo

takes the small MoE of demo.py (and trains it first if it is missing). It exports the model in nvfp4
and int4, after calibration (PTQ, with algorithm max and with gptq) and after distillation that
starts from each (QAD, examples/train_qat.py). It prints perplexity and KL to bf16 of the exported
checkpoints on held-out text.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).parent))
import demo
import make_small_moe

CHARACTERS = 4_000_000
TRAINING_TEXT = "train.txt"


def write_training_text(work_dir: Path) -> Path:
    """Write the small model's training text; it is used neither to measure nor to calibrate."""
    path = work_dir / TRAINING_TEXT
    texts = make_small_moe.read_texts(make_small_moe.parse(["--output-dir", str(work_dir)]))
    path.write_text("\n".join(texts.train)[:CHARACTERS], encoding="utf-8")
    return path


def export(args: argparse.Namespace, recipe: str, algorithm: str, trained: bool) -> Path:
    """Export after PTQ with ``algorithm``, or after QAT that starts from it."""
    model, name = args.work_dir / "small-moe", f"{recipe}-{algorithm}"
    out, saved = args.work_dir / f"{'qat' if trained else 'ptq'}-{name}", args.work_dir / name
    texts = ("--calib-dataset", args.work_dir / "calibration.txt", "--calib-size", "32")
    paths = ("--hf-model-id", model, "--export-dir", out, "--overwrite", *texts)
    how = ("--export-quant-cfg", recipe, "--algorithm", algorithm)
    layout = ("--tp", "2", "--ep", "2", *how, *demo.DTYPE)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(demo.RANKS))
    if trained:
        training = ("--train-data", args.work_dir / TRAINING_TEXT, "--train-steps", args.steps)
        start = ("--start-from", saved) if algorithm == "gptq" else ()
        flags = (*training, *start, "--lr", args.lr, "--kd-teacher", "bf16")
        script = ("train_qat.py", *map(str, flags))
    else:
        script = ("quantize.py", "--calib-seq-length", "128", "--megatron-save-path", str(saved))
    demo.run(*torchrun, demo.HERE / script[0], *paths, *layout, *script[1:])
    return out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["nvfp4", "int4"])
    parser.add_argument("--steps", type=int, default=120, help="QAD steps (default: 120)")
    parser.add_argument("--lr", type=float, default=1e-4, help="QAD learning rate (default: 1e-4)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    model = args.work_dir / "small-moe"
    demo.run(demo.HERE / "make_small_moe.py", "--output-dir", model)
    write_training_text(args.work_dir)
    rows = {"bf16": demo.measure(args, model)}
    for recipe in args.recipes:
        for algorithm in ("max", "gptq"):
            for name, trained in (("PTQ", False), ("QAD from", True)):
                out = export(args, recipe, algorithm, trained)
                row = f"{recipe}, {name} {algorithm}"
                rows[row] = demo.measure(args, out, "--against", model)
    demo.show(rows, f"Held-out text; QAD: {args.steps} steps")


if __name__ == "__main__":
    main()
