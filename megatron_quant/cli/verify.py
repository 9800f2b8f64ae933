"""The ``verify`` verb."""

import argparse
from pathlib import Path

from rich.table import Table

import megatron_quant as mq
from megatron_quant.cli.console import console, escape

_WORST = 10


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "verify",
        help="check that a checkpoint is complete and matches its own config",
        description="Reopen a checkpoint with safetensors alone. Check that every weight has its "
        "scales or is on the exclude list, that shapes and dtypes are right, scales finite and "
        "positive, the index complete and the config consistent. If not, name the tensors and exit "
        "non-zero.",
    )
    p.add_argument("directory", type=Path, metavar="DIR", help="the exported checkpoint")
    p.add_argument(
        "--against",
        type=Path,
        metavar="HF_DIR",
        help="the original: also check the dequantized error of every tensor",
    )
    p.add_argument(
        "--digests",
        action="store_true",
        help="also read all bytes and compare them with the digests that the export wrote",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Verify and print."""
    from megatron_quant.rendezvous import start_ranks

    report = mq.verify(
        args.directory,
        against=args.against,
        digests=args.digests,
        strict=False,
        groups=start_ranks(args.distributed_timeout_minutes),
    )
    out = console()
    for problem in report.problems:
        out.print(f"problem: {escape(str(problem))}")
    if args.against:
        out.print(_errors(report))
    report.raise_for_problems()
    out.print(f"{escape(str(args.directory))}: {len(report.tensors)} tensors, no problem found")


def _errors(report: "mq.Report") -> Table:
    table = Table("Tensor", "Format", "Relative error", title=f"Largest {_WORST} errors")
    for tensor in report.worst(_WORST):
        table.add_row(escape(tensor.name), tensor.format, f"{tensor.error:.4f}")
    return table
