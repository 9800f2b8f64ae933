"""The ``eval`` verb."""

import argparse
from functools import partial
from pathlib import Path

from rich.progress import track

import megatron_quant as mq
from megatron_quant.cli.console import console
from megatron_quant.cli.reporting import add_reporting
from megatron_quant.cli.tokenizer import add_tokenizer
from megatron_quant.documents import check_output_file, write_json


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "eval",
        help="measure perplexity on a text, and KL divergence from the original",
        description="Measure the perplexity of a bf16 or quantized checkpoint, and its mean KL per "
        "token to a reference. KL moves before perplexity does. The checkpoint is decoded into the "
        "transformers model; quantized activations are simulated with the stored scales.",
    )
    p.add_argument("directory", type=Path, metavar="DIR", help="the checkpoint")
    p.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    p.add_argument("--against", type=Path, metavar="HF_DIR", help="measure KL to this checkpoint")
    p.add_argument("--seq-length", type=int, default=512, help="tokens per window (default 512)")
    p.add_argument("--max-tokens", type=int, help="stop after this many tokens (default: all)")
    p.add_argument("--dtype", choices=mq.choices().dtypes, default="bf16", help="default bf16")
    p.add_argument(
        "--native",
        action="store_true",
        help="let transformers read the quantized format itself; it reads compressed-tensors "
        "(but NVFP4 experts wrongly) and not modelopt",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add_reporting(p)
    add_tokenizer(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print."""
    check_output_file("--json", args.json)
    out = console()
    result = mq.evaluate(
        args.directory,
        args.text,
        against=args.against,
        seq_length=args.seq_length,
        max_tokens=args.max_tokens,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        trust_remote_code=args.trust_remote_code,
        native=args.native,
        report=args.report,
        log_to=args.log_to,
        progress=partial(track, description="evaluate", console=out) if out.is_terminal else None,
    )
    kl = "" if result.kl is None else f", KL {result.kl:.5f}"
    out.print(f"perplexity {result.perplexity:.4f}{kl} ({result.tokens} tokens)")
    if args.json:
        figures = {"perplexity": result.perplexity, "kl": result.kl, "tokens": result.tokens}
        write_json(args.json, figures)
