"""Flags shared by the verbs that write an export: who reads it, and the layout of the ranks."""

import argparse
from typing import Any

import megatron_quant as mq

DIALECT_HELP = (
    "modelopt: vLLM, SGLang and TensorRT-LLM (its int4 and w4a8 only TensorRT-LLM). "
    "compressed-tensors: vLLM, SGLang and transformers. gptq, awq, auto-round: INT4 weights (and "
    "INT8 in gptq and auto-round) for vLLM and SGLang, and for transformers with their own "
    "packages. fp8: 128 x 128 blocks as DeepSeek stores them, for all of these "
    "engines. mxfp4: gpt-oss's stacks of experts. deepseek-v4: the form of DeepSeek-V4's release"
)


def add_dialect(group: "argparse._ActionsContainer", default: str) -> None:
    """Add ``--export-format``."""
    group.add_argument(
        "--export-format",
        choices=mq.choices().formats,
        default=default,
        help=f"who can read the export. {DIALECT_HELP} (default {default})",
    )


def add_layout(group: "argparse._ActionsContainer") -> None:
    """Add ``--tp``, ``--pp``, ``--cp``, ``--ep``, ``--etp`` and the flags of pipeline stages."""
    group.add_argument("--tp", type=int, default=1, help="tensor-parallel size (default 1)")
    group.add_argument("--pp", type=int, default=1, help="pipeline-parallel size (default 1)")
    group.add_argument(
        "--cp",
        type=int,
        default=1,
        help="context-parallel size: ranks that share the tokens of a sequence in calibration and "
        "evaluation (default 1)",
    )
    group.add_argument("--ep", type=int, default=1, help="expert-parallel size (default 1)")
    group.add_argument(
        "--etp", type=int, default=1, help="tensor-parallel size of the experts (default 1)"
    )
    _add_pipeline(group)


def _add_pipeline(group: "argparse._ActionsContainer") -> None:
    group.add_argument(
        "--num-virtual-stages-per-pipeline-rank",
        type=int,
        default=1,
        metavar="N",
        help="virtual pipeline stages of each pipeline rank (default 1: none)",
    )
    for end in ("first", "last"):
        group.add_argument(
            f"--num-layers-in-{end}-pipeline-stage",
            type=int,
            metavar="N",
            help=f"layers on the {end} pipeline rank, if not an even share",
        )


def add_serving(group: "argparse._ActionsContainer") -> None:
    """Add ``--serve-engine`` and ``--serve-tp``."""
    group.add_argument(
        "--serve-engine",
        choices=mq.choices().engines,
        help="refuse, before reading any weight, what this engine is known to reject or misread "
        "(default: refuse only what no engine can serve)",
    )
    group.add_argument(
        "--serve-tp",
        type=int,
        metavar="N",
        help="tensor-parallel size of the server: its ranks must hold whole groups and blocks; the "
        "error names the largest group size that works (default 1 with --serve-engine)",
    )


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of the front door that the verb's flags say."""
    flags = vars(args)
    return {
        "parallel": mq.Parallel.from_flags(flags),
        "calibration": mq.Calibration.from_flags(flags),
        "format": args.export_format,
        "serve": mq.Serve.from_flags(flags),
        "write": mq.Write.from_flags(flags),
        **({"auto": mq.AutoQuantize.from_flags(flags)} if "auto_quantize_bits" in flags else {}),
        **{name: flags[name] for name in mq.choices().flags if name in flags},
    }
