"""The ``export`` verb."""

import argparse
from pathlib import Path

from megatron_quant.cli.console import ConsolePhases, console
from megatron_quant.cli.host import ready_host
from megatron_quant.cli.report import left_out_lines
from megatron_quant.cli.serving import add_dialect, add_layout, add_serving
from megatron_quant.cli.tables import files_table
from megatron_quant.cli.writing import add_writing
from megatron_quant.errors import ExportError
from megatron_quant.recipes import EXPERT_SCALES
from megatron_quant.runs import DTYPES, QuantizeOptions, Serve, Write, from_flags


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "export",
        help="write a quantized checkpoint in an engine's format",
        description="Rewrite a quantized checkpoint in another dialect, with the same codes and "
        "scales: no model, no calibration, no second rounding. Or export a Megatron checkpoint of "
        "a quantized model, at any layout, without calibrating. Under torchrun the ranks share the "
        "work.",
    )
    p.add_argument(
        "source", type=Path, metavar="DIR", nargs="?", help="the quantized checkpoint to rewrite"
    )
    _megatron_flags(p)
    p.add_argument("--export-dir", type=Path, required=True, help="where the new checkpoint goes")
    add_dialect(p, "modelopt")
    add_serving(p)
    add_writing(p)
    p.set_defaults(run=run)


def _megatron_flags(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("from a Megatron checkpoint")
    group.add_argument(
        "--megatron-load-path",
        type=Path,
        metavar="LOAD_DIR",
        help="export this checkpoint (torch_dist) that quantize saved with --megatron-save-path",
    )
    group.add_argument(
        "--hf-model-id",
        help="where the model's config.json and tokenizer are (default: those saved with it)",
    )
    group.add_argument(
        "--expert-scales",
        choices=EXPERT_SCALES,
        help="convert the experts' weight scales (default: as they were saved)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="dtype of the model, and of unquantized tensors in the export (default bf16)",
    )
    add_layout(group)


def run(args: argparse.Namespace) -> None:
    """Export and print the files."""
    if (args.source is None) == (args.megatron_load_path is None):
        raise ExportError(
            "export needs either the directory of a quantized checkpoint or --megatron-load-path"
        )
    if args.source is None:
        _from_megatron(args)
    else:
        _rewrite(args)


def _from_megatron(args: argparse.Namespace) -> None:
    ready_host()
    from megatron_quant.mcore.model import start_distributed
    from megatron_quant.runs import quantize_run

    options = QuantizeOptions.from_flags(**vars(args))
    out = console()
    groups = start_distributed(args.distributed_timeout_minutes)
    outcome = quantize_run(options, groups, ConsolePhases(out))
    out.print(files_table(outcome.job.exported, args.verbose))
    for line in left_out_lines(outcome.left_out):
        out.print(line)


def _rewrite(args: argparse.Namespace) -> None:
    from megatron_quant.rendezvous import start_ranks
    from megatron_quant.runs import ExportOptions, reexport

    out = console()
    options = ExportOptions(
        source=args.source,
        export_dir=args.export_dir,
        export_format=args.export_format,
        serve=from_flags(Serve, vars(args)),
        write=from_flags(Write, vars(args)),
    )
    groups = start_ranks(args.distributed_timeout_minutes)
    rewritten = reexport(options, groups, ConsolePhases(out))
    out.print(files_table(rewritten.plan, args.verbose))
    for line in left_out_lines(rewritten.left_out):
        out.print(line)
