"""The ``eval`` verb."""

import argparse
import json
from pathlib import Path

from rich.progress import track

from megatron_quant.cli.console import check_output_file, console
from megatron_quant.cli.tokenizer import add_tokenizer
from megatron_quant.errors import QuantError
from megatron_quant.runs import DTYPES, dtype_of


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "eval",
        help="perplexity on a text, and KL divergence from the original",
        description="Measure the perplexity of a bf16 or quantized checkpoint, and its mean KL per "
        "token to a reference. KL moves before perplexity does. The checkpoint is decoded into the "
        "transformers model; quantized activations are simulated with the stored scales.",
    )
    p.add_argument("directory", type=Path, metavar="DIR", help="the checkpoint")
    p.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    p.add_argument("--against", type=Path, metavar="HF_DIR", help="measure KL to this checkpoint")
    p.add_argument("--seq-length", type=int, default=512, help="tokens per window (default 512)")
    p.add_argument("--max-tokens", type=int, help="stop after this many tokens (default: all)")
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    p.add_argument(
        "--native",
        dest="load",
        action="store_const",
        const="native",
        default="decoded",
        help="let transformers read the quantized format itself; it reads compressed-tensors "
        "(but NVFP4 experts wrongly) and not modelopt",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add_tokenizer(p)
    p.set_defaults(run=run)


def _check(args: argparse.Namespace) -> None:
    for flag, value in (("--seq-length", args.seq_length), ("--max-tokens", args.max_tokens)):
        if value is not None and value < 1:
            raise QuantError(f"{flag} is {value}: give at least 1")
    check_output_file("--json", args.json)


def run(args: argparse.Namespace) -> None:
    """Evaluate and print."""
    _check(args)
    from transformers.utils import logging

    from megatron_quant.evaluation import Text, TokenizerChoice, decoded, evaluate, native

    out = console()
    if not out.is_terminal:
        logging.disable_progress_bar()
    tokenizer = TokenizerChoice(args.tokenizer, args.trust_remote_code)
    result = evaluate(
        args.directory,
        Text(args.text, args.seq_length, args.max_tokens, tokenizer),
        args.against,
        dtype_of(args.dtype),
        {"decoded": decoded, "native": native}[args.load],
        lambda windows: track(windows, "evaluate", console=out, disable=not out.is_terminal),
    )
    kl = "" if result.kl is None else f", KL {result.kl:.5f}"
    out.print(f"perplexity {result.perplexity:.4f}{kl} ({result.tokens} tokens)")
    if args.json:
        figures = {"perplexity": result.perplexity, "kl": result.kl, "tokens": result.tokens}
        args.json.write_text(json.dumps(figures) + "\n")
