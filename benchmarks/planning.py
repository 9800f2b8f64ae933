"""Measure the planning of large models' exports, and how evenly ranks share the writing.

The models themselves are not needed: plans follow from their shapes. Each plan is made in its own
process, so that its memory can be measured.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict

import torch

from benchmarks.report import host, table
from benchmarks.shapes import EXPERTS, MODELS, params
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.ckpt.plan.cost import measured, spread
from megatron_quant.ckpt.plan.export_plan import ExportPlan, plan_export
from megatron_quant.ckpt.plan.placing import StorageRules
from megatron_quant.ckpt.plan.proof import check_plan
from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.formats.spec import get_format
from megatron_quant.recipes.plan import Decision, QuantPlan

LAYOUTS = {8: (8, 1, 8, 1), 512: (512, 4, 64, 1)}
"""Ranks -> ranks, tp, ep, etp."""
FORMATS = ("fp8_block", "nvfp4")
_SHARD_BYTES = 5 * 10**9
_GB = 1e9


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the parser."""
    p = verbs.add_parser("planning", help="plans of large models at 8 and 512 simulated ranks")
    p.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    p.add_argument("--one", nargs=3, metavar=("MODEL", "FORMAT", "RANKS"), help=argparse.SUPPRESS)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table, or the figures of one plan as JSON."""
    if args.one:
        model, fmt, ranks = args.one
        print(json.dumps(figures(model, fmt, int(ranks))))
    else:
        print(report(args.models))


def figures(model: str, fmt: str, ranks: int) -> dict[str, float]:
    """Return the figures of a plan of ``model`` with all linears in ``fmt``."""
    found = params(model)
    weights = get_format(fmt)
    decisions = (
        Decision(slot=slot, rule="all")
        if slot.fixed
        else Decision(slot=slot, rule="all", weights=weights)
        for slot in slots(found)
    )
    quant = QuantPlan("all", tuple(decisions))
    layout = Layout.simulate(*LAYOUTS[ranks], experts=EXPERTS[model])
    dialect = get_dialect("compressed-tensors")

    def proven() -> ExportPlan:
        plan = plan_export(
            found,
            quant,
            layout,
            StorageRules(
                dialect=dialect,
                dtype=torch.bfloat16,
                max_shard_bytes=_SHARD_BYTES,
            ),
        )
        check_plan(plan)
        return plan

    plan, cost = measured(proven)
    shares = spread(plan, ranks)
    counts = {"tensors": len(plan.entries), "parts": len(plan.parts), "bytes": plan.bytes_after}
    return {**asdict(cost), **asdict(shares), **counts, "imbalance": shares.imbalance}


def _apart(model: str, fmt: str, ranks: int) -> dict[str, float]:
    """Call :func:`figures` in another process."""
    argv = [sys.executable, "-m", "benchmarks.export", "planning", "--one", model, fmt, str(ranks)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def report(models: list[str]) -> str:
    """The table, in Markdown."""
    rows = [_row(model, fmt, ranks) for model in models for fmt in FORMATS for ranks in LAYOUTS]
    header = "model|format|ranks|file tensors|parts|GB|plan, s|plan, MB|GB a rank|imbalance"
    layouts = "; ".join(
        f"{ranks}: tp {tp}, ep {ep}, etp {etp}" for ranks, tp, ep, etp in LAYOUTS.values()
    )
    about = (
        f"Planning with the proof of one owner a byte, on one thread of {host()}. Ranks {layouts}."
    )
    return table(about, header, rows)


def _row(model: str, fmt: str, ranks: int) -> list[str]:
    f = _apart(model, fmt, ranks)
    return [
        model,
        fmt,
        str(ranks),
        str(f["tensors"]),
        str(f["parts"]),
        f"{f['bytes'] / _GB:.0f}",
        f"{f['seconds']:.1f}",
        f"{f['nbytes'] / 1e6:.0f}" if f["nbytes"] is not None else "-",
        f"{f['smallest'] / _GB:.2f} to {f['largest'] / _GB:.2f}",
        f"{f['imbalance']:.3f}",
    ]
