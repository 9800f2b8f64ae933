"""The ``quantize`` verb: flags as Megatron-Bridge's quantize.py names them."""

import argparse
from pathlib import Path

import megatron_quant as mq
from megatron_quant.cli.console import ConsolePhases, console, escape
from megatron_quant.cli.report import summary, summary_of_stream
from megatron_quant.cli.reporting import add_reporting
from megatron_quant.cli.search import add_search, places_table, scoring_lines
from megatron_quant.cli.serving import add_dialect, add_layout, add_serving, arguments
from megatron_quant.cli.tables import (
    engines_table,
    files_table,
    folding_table,
    needs,
    planning_lines,
    rules_table,
    sizes_line,
    statistics_table,
    weights_table,
)
from megatron_quant.cli.tokenizer import add_tokenizer
from megatron_quant.cli.writing import add_writing

_EPILOG = """\
examples:
  # weights only, no forward, 4 ranks
  torchrun --nproc-per-node 4 examples/quantize.py --hf-model-id Qwen/Qwen3-30B-A3B \\
      --export-quant-cfg w4a16_nvfp4 --tp 2 --ep 2 --export-dir OUT
  # weights and activations (W4A4), calibrated on a text file
  torchrun --nproc-per-node 8 examples/quantize.py --hf-model-id PATH \\
      --export-quant-cfg nvfp4 --tp 2 --ep 4 --calib-dataset corpus.jsonl --export-dir OUT
  # INT4 by GPTQ; what was measured serves other formats and layouts too
  torchrun --nproc-per-node 4 examples/quantize.py --hf-model-id PATH --export-quant-cfg int4 \\
      --algorithm gptq --tp 2 --ep 2 --calib-dataset corpus.jsonl --export-dir OUT \\
      --save-calibration KEPT.safetensors --keep-hessians
  # weights only, file to file, without a model, in little memory
  megatron-quant quantize --stream --hf-model-id PATH --export-quant-cfg int4 --export-dir OUT
  # what would happen, from config.json alone
  megatron-quant quantize --hf-model-id PATH --export-quant-cfg nvfp4 --dry-run

The result does not depend on --tp, --pp, --cp, --ep and --etp: every layout writes the same bytes.
Ranks that tensor and pipeline parallelism leave over are data parallel: they share the
calibration data.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the top parser."""
    p = verbs.add_parser(
        "quantize",
        help="turn a Hugging Face checkpoint into a quantized one that engines serve",
        description="Quantize a Hugging Face checkpoint through Megatron. Run it under torchrun to "
        "use more than one rank.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _model_flags(p)
    _calibration_flags(p)
    _export_flags(p)
    add_search(p)
    p.set_defaults(run=run)


def _model_flags(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("model and layout")
    group.add_argument(
        "--hf-model-id",
        help="checkpoint directory or hub id (safetensors only); with --megatron-load-path only "
        "its config.json and tokenizer are read (default then: those saved with it)",
    )
    group.add_argument(
        "--export-quant-cfg",
        metavar="CFG",
        help=f"recipe: {', '.join(mq.choices().recipes)}; a YAML path; or a ModelOpt preset name "
        "such as NVFP4_DEFAULT_CFG or NVFP4_DEFAULT_CFG+FP8_KV_CFG",
    )
    group.add_argument(
        "--megatron-load-path",
        type=Path,
        metavar="DIR",
        help="a Megatron checkpoint, saved at any layout: of a training run, whose weights are "
        "quantized in place of --hf-model-id's; or of a quantized model, whose weights, quantizers "
        "and recipe are taken in place of calibrating",
    )
    group.add_argument(
        "--skip-keys",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keys of --megatron-load-path to leave out, such as 'mtp.*'; may be given again",
    )
    add_layout(group)
    group.add_argument(
        "--dtype",
        choices=mq.choices().dtypes,
        default="bf16",
        help="dtype of the model, and of unquantized tensors in the export (default bf16)",
    )


def _calibration_flags(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("calibration")
    group.add_argument(
        "--weight-only",
        action="store_true",
        help="quantize no activations, whatever the recipe says; needs no forward, unless the "
        "algorithm is imatrix, gptq or awq",
    )
    group.add_argument(
        "--keep-scales",
        action="store_true",
        help="for a source that is quantized already: keep its scales, and so its codes; refused "
        "where its format and groups are not the recipe's",
    )
    group.add_argument(
        "--quantize-mtp",
        action="store_true",
        help="quantize layers for speculation (MTP) too, by the rules that match their linears; "
        "Megatron's own mtp calibrates them (default: they stay as they are)",
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="quantize file to file, one tensor at a time: no Megatron model, and memory does not "
        "grow with the model; the ranks share the tensors",
    )
    group.add_argument(
        "--expert-scales",
        choices=mq.choices().expert_scales,
        help="one weight scale for all experts of a layer, or one each (default: shared, or what "
        "--megatron-load-path holds); scales of groups and blocks are never shared",
    )
    group.add_argument(
        "--algorithm",
        choices=("max", "mse", "imatrix", "gptq", "awq", "smoothquant"),
        help="how to quantize weights, instead of as the recipe says. max: the largest magnitude "
        "makes the scale. mse: searches for the least squared error; needs no data, and may do "
        "harm at 4 bits if inputs have outliers. imatrix: the same search, with each column "
        "weighted by the squares of its calibrated inputs. gptq: imatrix's scales, then columns "
        "are rounded one after another, each making up for the errors of those before; loses "
        "least, takes the most time and memory. awq, smoothquant: large channels of inputs are "
        "divided, and columns of weights multiplied, by factors that are folded into the norm or "
        "linear before; then scales as imatrix, or as max",
    )
    group.add_argument(
        "--damp",
        type=float,
        metavar="D",
        help="for gptq: the share of the mean diagonal of the inputs' second moment that is added "
        "to it, above 0 and at most 1 (default 0.01, for nvfp4 0.05); more trusts the data less",
    )
    group.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="for awq and smoothquant: how far to move, from 0 to 1 (default: awq searches each "
        "place's, smoothquant takes 0.5)",
    )
    _data_flags(group)


def _data_flags(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--act-percentile",
        type=float,
        default=100.0,
        metavar="P",
        help="clip each layer's calibrated inputs above their P-th percentile, such as 99.9 "
        "(default 100: no clipping)",
    )
    group.add_argument("--calib-size", type=int, default=512, help="samples to run (default 512)")
    group.add_argument(
        "--calib-seq-length", type=int, default=512, help="tokens per sample (default 512)"
    )
    group.add_argument(
        "--calib-batch-size", type=int, default=4, help="samples per forward (default 4)"
    )
    group.add_argument(
        "--calib-dataset",
        default="stdlib",
        help="text file; .jsonl, .json or .parquet of records with 'text' or a chat ('messages'); "
        "folder of them; or hub id (default: the Python standard library's sources)",
    )
    group.add_argument(
        "--save-calibration",
        type=Path,
        metavar="FILE",
        help="keep what calibration measured, by the names of the weights, as safetensors",
    )
    group.add_argument(
        "--keep-hessians",
        action="store_true",
        help="with --save-calibration: keep the second moments of inputs too, which gptq needs; "
        "inputs^2 x 4 bytes for each linear and each expert",
    )
    group.add_argument(
        "--calib-memory",
        default="16GB",
        metavar="SIZE",
        help="of gptq: second moments of inputs that a rank holds at a time; with less the data "
        "runs more often, with the same result (default 16GB; --dry-run says how often)",
    )
    group.add_argument(
        "--calib-experts",
        default="routed",
        metavar="routed|all|SHARE",
        help="experts that each token is measured for: the router's (default), all of its layer, "
        "or this share of them, such as 0.25, by the router's scores. No output changes",
    )
    group.add_argument(
        "--sequential",
        action="store_true",
        help="of gptq with --stream: measure each layer behind the layers that are "
        "rounded already, not behind the checkpoint's own; about twice the time",
    )
    group.add_argument(
        "--load-calibration",
        type=Path,
        metavar="FILE",
        help="take what --save-calibration kept, in place of running data: another format, dialect "
        "or layout, or another run, gets equal bytes from it",
    )
    add_tokenizer(group)
    group.add_argument(
        "--cold-experts",
        choices=("error", "layer-max"),
        default="error",
        help="for an expert that saw no token: stop, or use the layer's largest amax (default: "
        "error)",
    )


def _export_flags(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("export")
    group.add_argument("--export-dir", type=Path, help="where the new checkpoint goes")
    group.add_argument(
        "--megatron-save-path",
        type=Path,
        metavar="DIR",
        help="save the model with its quantizers as a Megatron checkpoint (torch_dist), which "
        "export and quantize load at any layout; with --export-dir or alone",
    )
    add_dialect(group, "modelopt")
    add_serving(group)
    group.add_argument(
        "--export-kv-cache-quant",
        choices=("none", *mq.choices().kv_caches),
        help="FP8 KV cache: fp8 calibrates a scale for the keys and one for the values of each "
        "layer; fp8_cast uses scale 1 and needs no data; modelopt and compressed-tensors only "
        "(default: as the recipe says)",
    )
    add_writing(group)
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would happen to every weight, from config.json alone; writes nothing",
    )
    group.add_argument(
        "--eval-text",
        type=Path,
        help="also report perplexity and KL to bf16 of the fake-quantized model on this text",
    )
    add_reporting(group)


def run(args: argparse.Namespace) -> None:
    """Quantize, or print the plan."""
    out = console()
    place = (args.hf_model_id, args.export_quant_cfg)
    given = arguments(args)
    if args.dry_run and args.auto_quantize_bits is not None:
        planned = mq.plan_search(args.hf_model_id, **given)
        out.print(places_table(planned, args.verbose))
        for line in scoring_lines(planned, args.auto_quantize_checkpoint):
            out.print(line)
    elif args.dry_run:
        job = mq.plan(*place, **given)
        _print_plan(job, args)
    elif args.stream:
        streamed = mq.stream(*place, args.export_dir, phases=ConsolePhases(out), **given)
        if args.auto_quantize_bits is not None:
            out.print(escape(streamed.job.recipe.description))
        for line in summary_of_stream(streamed):
            out.print(line)
    else:
        outcome = mq.quantize_checkpoint(
            *place, args.export_dir, phases=ConsolePhases(out), **given
        )
        if outcome.found is not None:
            out.print(escape(outcome.job.recipe.description))
        out.print(statistics_table(outcome.statistics, args.verbose))
        for line in summary(outcome):
            out.print(line)


def _print_plan(job: "mq.Job", args: argparse.Namespace) -> None:
    out = console()
    out.print(weights_table(job, args.verbose))
    out.print(rules_table(job))
    if (folding := folding_table(job, args.verbose)) is not None:
        out.print(folding)
    out.print(files_table(job.exported, args.verbose))
    out.print(engines_table(job, args.serve_tp))
    for line in needs(job, args.calib_size * args.calib_seq_length):
        out.print(line)
    out.print(sizes_line(job.exported))
    for line in planning_lines(job):
        out.print(line)
