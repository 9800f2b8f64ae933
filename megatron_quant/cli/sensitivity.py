"""The ``sensitivity`` verb."""

import argparse
from pathlib import Path

from rich.table import Table

import megatron_quant as mq
from megatron_quant.cli.console import ConsolePhases, console, escape
from megatron_quant.cli.reporting import add_reporting
from megatron_quant.cli.tokenizer import add_tokenizer
from megatron_quant.documents import check_output_file, write_json


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "sensitivity",
        help="measure what each family of weights loses in each format, alone",
        description="Quantize one family of weights at a time (attention, experts, shared experts, "
        "linear attention, lm_head, the first and the last layer, the KV cache) and measure the "
        "mean KL divergence of a token's logits. Runs transformers' model, whole in memory.",
    )
    p.add_argument("--hf-model-id", required=True, metavar="PATH", help="checkpoint or hub id")
    p.add_argument(
        "--formats",
        default="nvfp4,fp8",
        metavar="CFGS",
        help="recipes with commas between (default nvfp4,fp8)",
    )
    p.add_argument("--calib-dataset", default="stdlib", help="text, as of quantize")
    p.add_argument("--calib-size", type=int, default=32, help="samples (default 32)")
    p.add_argument("--calib-seq-length", type=int, default=512, help="tokens each (default 512)")
    p.add_argument("--calib-batch-size", type=int, default=4, help="samples at a time (default 4)")
    p.add_argument(
        "--cold-experts",
        choices=("error", "layer-max"),
        default="layer-max",
        help="experts that no token reached: stop, or take the layer's largest inputs (default)",
    )
    p.add_argument("--dtype", choices=mq.choices().dtypes, default="bf16", help="default bf16")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add_reporting(p)
    add_tokenizer(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    check_output_file("--json", args.json)
    out = console()
    found = mq.sensitivity(
        args.hf_model_id,
        args.formats,
        calibration=mq.Calibration.from_flags(vars(args)),
        dtype=args.dtype,
        report=args.report,
        log_to=args.log_to,
        phases=ConsolePhases(out),
    )
    table = Table("Family", "Format", "Weights", "Bits", "KL", title=f"{found.tokens} tokens")
    for row in found.rows:
        weights = f"{row.weights:,}" if row.weights else ""
        table.add_row(row.family, escape(row.format), weights, f"{row.bits:.3f}", f"{row.kl:.5f}")
    out.print(table)
    for line in found.left_out:
        out.print(escape(f"left out: {line}"))
    if args.json:
        write_json(args.json, found.document())
