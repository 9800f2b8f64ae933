"""KL of quantized models to their bf16 selves, at equal bits, by algorithm and by tool.

    make accuracy

exports each model by ``--stream`` with each algorithm, decodes what was written, and measures mean
KL(bf16 || export) over windows of held-out text. Rows of other tools appear where their environment
is given (--llm-compressor). docs/accuracy.md holds what was printed last.
"""

import argparse
import json
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
import yaml

import megatron_quant as mq
from benchmarks.gemma import Unavailable, make
from benchmarks.report import host, replace_measured, table
from megatron_quant.evaluation import Text, decoded, read_windows

_PATTERNS = ["*self_attn*", "*mlp*"]
_OTHER = Path(__file__).with_name("accuracy_llm_compressor.py")
_NVFP4, _W4A4 = {"weights": "nvfp4"}, {"weights": "nvfp4", "inputs": "nvfp4"}
_INT4 = {"weights": {"format": "int4", "group_size": 128}}
_INT4_ASYM = {"weights": {"format": "int4_asym", "group_size": 128}}
_FP8 = {"weights": "fp8"}
_W8A8 = {"weights": "int8", "inputs": "int8"}
_ALGORITHMS = ("max", "mse", "imatrix", "awq", "gptq")
ROWS = [
    *(("int4 g128", _INT4, a) for a in _ALGORITHMS),
    *(("int4_asym g128", _INT4_ASYM, a) for a in _ALGORITHMS),
    *(("nvfp4", _NVFP4, a) for a in ("max", "four_over_six", "mse", "imatrix", "awq", "gptq")),
    *(("nvfp4 W4A4", _W4A4, a) for a in ("max", "mse", "awq", "smoothquant", "gptq")),
    *(("fp8", _FP8, a) for a in ("max", "gptq")),
    *(("int8 W8A8", _W8A8, a) for a in ("max", "smoothquant")),
]
"""(bits, rule without its algorithm, algorithm), in the order of the table."""
_THEIRS = {"int4 g128": "W4A16", "nvfp4": "NVFP4A16", "nvfp4 W4A4": "NVFP4"}
"""Bits -> llm-compressor's name of them."""
_HEADER = "model|storage|by|KL, millinats|+-|of max's|perplexity|export, CPU s"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and what it is measured on.

    Attributes:
        name: Its name in the table.
        path: The checkpoint, bf16.
        windows: Windows of held-out text, at most; each ``seq_length`` tokens.
        every: One token of so many is judged; vocabularies of 262 144 take their time.
    """

    name: str
    path: Path
    windows: int
    seq_length: int
    every: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--moe", type=Path, required=True, help="checkpoint of make_small_moe.py")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate with")
    parser.add_argument(
        "--gemma", type=Path, help="where Gemma 3 270M is, or is made; left out without"
    )
    parser.add_argument("--calib-size", type=int, default=128, help="samples of 512 tokens")
    parser.add_argument("--rows", nargs="*", help="storages to measure (default: all)")
    parser.add_argument("--llm-compressor", type=Path, help="Python of an environment that has it")
    parser.add_argument("--write", type=Path, help="page whose measured part is replaced")


def _reference(model: Model, cut: list[torch.Tensor]) -> list[torch.Tensor]:
    logits = decoded(model.path, torch.bfloat16)
    return [logits(w[:-1])[:: model.every].clone() for w in cut]


def _judge(
    model: Model, path: Path, cut: list[torch.Tensor], reference: list[torch.Tensor]
) -> tuple[list[float], float]:
    """Mean KL of each window in nats, and perplexity over all judged tokens."""
    logits = decoded(path, torch.bfloat16)
    kl, nll = [], []
    for window, ref_TV in zip(cut, reference, strict=True):
        logp_TV = F.log_softmax(logits(window[:-1])[:: model.every].float(), dim=-1)
        ref_TV = F.log_softmax(ref_TV.float(), dim=-1)
        kl.append((ref_TV.exp() * (ref_TV - logp_TV)).sum(-1).double().mean().item())
        nll.append(F.nll_loss(logp_TV, window[1:][:: model.every]).item())
    return kl, math.exp(mean(nll))


def _export(model: Model, rule: dict[str, object], args: argparse.Namespace, out: Path) -> float:
    """Export by ``--stream``; return its CPU seconds."""
    recipe = out.with_suffix(".yaml")
    rules = [{"quantize": _PATTERNS, **rule}]
    recipe.write_text(yaml.safe_dump({"description": "A row.", "rules": rules}), encoding="utf-8")
    before = time.process_time()
    calibration = mq.Calibration(dataset=str(args.calibration), size=args.calib_size)
    mq.stream(model.path, str(recipe), out, format="compressed-tensors", calibration=calibration)
    return time.process_time() - before


def _ours(
    model: Model, args: argparse.Namespace, work: Path
) -> Iterator[tuple[str, str, Path, float]]:
    for storage, rule, algorithm in ROWS:
        if args.rows and storage not in args.rows:
            continue
        out = work / "export"
        try:
            taken = _export(model, {**rule, "algorithm": algorithm}, args, out)
        except mq.QuantError as reason:
            print(f"{model.name}, {storage} {algorithm}: not measured: {reason}", flush=True)
            continue
        yield storage, algorithm, out, taken
        shutil.rmtree(out)


def _theirs(
    model: Model, args: argparse.Namespace, work: Path
) -> Iterator[tuple[str, str, Path, float]]:
    if args.llm_compressor is None:
        return
    for storage, scheme in _THEIRS.items():
        if args.rows and storage not in args.rows:
            continue
        for how in ("RTN", "GPTQ"):
            out = work / "theirs"
            words = [scheme, how, model.path, args.calibration, out, args.calib_size]
            command = [str(args.llm_compressor), str(_OTHER), *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                print(f"llm-compressor, {scheme} {how}: not measured: {lines[-1]}", flush=True)
                continue
            seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
            yield storage, f"llm-compressor {how}", out, seconds
            shutil.rmtree(out)


def measure(model: Model, args: argparse.Namespace) -> list[list[str]]:
    """Measure every row of a model."""
    text = Text(args.heldout, seq_length=model.seq_length)
    cut = read_windows(model.path, text)[: model.windows]
    reference = _reference(model, cut)
    least: dict[str, float] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for produce in (_ours, _theirs):
            for storage, how, path, taken in produce(model, args, Path(folder)):
                kl, perplexity = _judge(model, path, cut, reference)
                if how == "max":
                    least[storage] = mean(kl)
                of_max = f"{mean(kl) / least[storage]:.2f}" if storage in least else "-"
                row = [
                    *(model.name, storage, how, f"{1e3 * mean(kl):.2f}"),
                    *(f"{1e3 * stdev(kl) / math.sqrt(len(kl)):.2f}", of_max),
                    *(f"{perplexity:.3f}", f"{taken:.1f}"),
                ]
                print(" | ".join(row), flush=True)
                rows.append(row)
    return rows


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write the page."""
    models = [
        Model(name="small MoE", path=args.moe, windows=64, seq_length=128, every=1),
    ]
    if args.gemma is not None:
        try:
            path = make(args.gemma)
            models.append(
                Model(name="Gemma 3 270M", path=path, windows=16, seq_length=512, every=8)
            )
        except Unavailable as reason:
            print(f"Gemma 3 270M: not measured: {reason}", flush=True)
    rows = [row for model in models for row in measure(model, args)]
    title = (
        f"KL(bf16 || export) per token over windows of held-out text, with its standard error. "
        f"Calibrated with {args.calib_size} samples of 512 tokens. {host()}, one process."
    )
    printed = table(title, _HEADER, rows)
    print(printed)
    if args.write:
        replace_measured(args.write, printed)


def main(argv: list[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
