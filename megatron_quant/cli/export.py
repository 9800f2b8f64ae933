"""The ``export`` verb."""

import argparse
from pathlib import Path

from megatron_quant.api.export import ExportOptions, reexport
from megatron_quant.cli.console import Phases, console
from megatron_quant.cli.ranks import start_ranks
from megatron_quant.cli.serving import add_dialect, add_serving
from megatron_quant.cli.tables import files_table
from megatron_quant.cli.writing import add_writing


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "export",
        help="rewrite a quantized checkpoint in another engine's format",
        description="Write a checkpoint that quantize made in another dialect, with the same codes "
        "and scales: no model, no calibration, no second rounding. Under torchrun the ranks share "
        "the work.",
    )
    p.add_argument("source", type=Path, metavar="DIR", help="the quantized checkpoint")
    p.add_argument("--export-dir", type=Path, required=True, help="where the new one goes")
    add_dialect(p, None)
    add_serving(p)
    add_writing(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Rewrite and print the files."""
    out = console()
    options = ExportOptions(
        args.source,
        args.export_dir,
        args.export_format,
        args.max_shard_size,
        args.overwrite,
        args.serve_engine,
        args.serve_tp,
        args.io_threads,
        args.fsync,
        args.resume,
    )
    plan = reexport(options, start_ranks(), Phases(out))
    out.print(files_table(plan))
