"""The ``export`` verb."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import megatron_quant as mq
from megatron_quant.cli.console import ConsolePhases, console
from megatron_quant.cli.report import left_out_lines
from megatron_quant.cli.serving import add_dialect, add_layout, add_serving, arguments
from megatron_quant.cli.tables import files_table
from megatron_quant.cli.writing import add_writing
from megatron_quant.errors import ExportError


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "export",
        help="rewrite a quantized checkpoint in another engine's format, code for code",
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
        choices=mq.choices().expert_scales,
        help="convert the experts' weight scales (default: as they were saved)",
    )
    group.add_argument(
        "--dtype",
        choices=mq.choices().dtypes,
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
    phases = ConsolePhases(console())
    outcome = mq.quantize_checkpoint(
        args.hf_model_id, None, args.export_dir, phases=phases, **arguments(args)
    )
    _print_files(outcome.job.exported, outcome.left_out, args.verbose)


def _rewrite(args: argparse.Namespace) -> None:
    # Only here: torch takes seconds to import.
    from megatron_quant.rendezvous import start_ranks

    given = arguments(args)
    rewritten = mq.convert(
        args.source,
        args.export_dir,
        format=given["format"],
        serve=given["serve"],
        write=given["write"],
        groups=start_ranks(args.distributed_timeout_minutes),
        phases=ConsolePhases(console()),
    )
    _print_files(rewritten.plan, rewritten.left_out, args.verbose)


def _print_files(plan: "mq.ExportPlan", left_out: Sequence[str], verbose: bool) -> None:
    out = console()
    out.print(files_table(plan, verbose))
    for line in left_out_lines(left_out):
        out.print(line)
