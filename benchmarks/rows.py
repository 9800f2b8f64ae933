"""Write tensors whose rows shards cut: each piece where it belongs, or rows joined first.

Ranks write bf16 tensors in turns, without syncing. Each rank has the given bytes of every row.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.report import host, replace_measured, table
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.ckpt.plan import row_joins
from megatron_quant.ckpt.plan.export_plan import ExportPlan, plan_export
from megatron_quant.ckpt.plan.parts import RankPart
from megatron_quant.ckpt.plan.placing import StorageRules
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.ckpt.plan.sidecars import Companions
from megatron_quant.ckpt.write.encode_part import Produced
from megatron_quant.ckpt.write.exporter import Destination, export
from megatron_quant.ckpt.write.pipeline import WriteOptions
from megatron_quant.dist import Groups, Shards
from megatron_quant.models.spec import Parallel, Param, Role, Source
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot

_WIDTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_BYTES, _TENSORS, _ROWS = 32 << 20, 4, 1 << 16
_HEADER = (
    "bytes of a row on a rank|MB|in pieces, CPU s|joined, CPU s|in pieces, wall s|joined, wall s"
)


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the parser."""
    p = verbs.add_parser("rows", help="pieces of rows, written one by one or joined")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--folder", type=Path, help="where files are made (default: temporary)")
    p.add_argument("--write", type=Path, help="page whose part measured here is replaced")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks)]
    argv += ["-m", "benchmarks.rows", str(args.turns)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        done = subprocess.run(
            [*argv, folder], stdout=subprocess.PIPE, text=True, env=env, check=True
        )
    rows = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    about = f"{args.ranks} ranks on {host()}; medians of {args.turns} turns; CPU seconds of all."
    measured = table(about, _HEADER, rows)
    print(measured)
    if args.write:
        replace_measured(args.write, measured, "rows")


@dataclass(frozen=True)
class Took:
    """Seconds of one export: CPU of all ranks, wall of the slowest."""

    cpu: float
    wall: float


def _plan(width: int, ranks: int) -> ExportPlan:
    shape = (min(_BYTES // (width * ranks), _ROWS), width // 2 * ranks)
    names = [f"model.layers.{number}.o_proj.weight" for number in range(_TENSORS)]
    params = [
        Param(
            name=n,
            sources=(Source(n, shape),),
            shape=shape,
            role=Role.LINEAR,
            parallel=Parallel.ROW,
        )
        for n in names
    ]
    slots = (Slot(name=p.name, sources=(p.sources[0].module,), shape=p.shape) for p in params)
    quant = QuantPlan("plain", tuple(Decision(slot=slot, rule="none") for slot in slots))
    layout = Layout.simulate(ranks, ranks, 1, 1)
    return plan_export(
        params,
        quant,
        layout,
        StorageRules(
            dialect=get_dialect("modelopt"),
            dtype=torch.bfloat16,
            max_shard_bytes=10**10,
        ),
    )


def _produce(part: RankPart) -> Iterator[Produced]:
    for piece in part.pieces:
        yield piece.entry, piece.box, torch.ones(piece.box.size, dtype=torch.bfloat16)


def _took(plan: ExportPlan, groups: Groups, out: Path) -> Took:
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    export(
        plan,
        groups,
        _produce,
        Destination(
            directory=out, companions=Companions(documents={}), options=WriteOptions(2, False)
        ),
    )
    took = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall])
    most = took.clone()
    dist.all_reduce(took)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        shutil.rmtree(out)
    return Took(float(took[0]), float(most[1]))


def main() -> None:
    """Measure all widths on every rank; print a line of the table for each."""
    turns, out = int(sys.argv[1]), Path(sys.argv[2]) / "out"
    dist.init_process_group("gloo")
    row_joins.LONG_BYTES = 1 << 40  # all that may be joined
    ways = (Groups(), Groups(shards=Shards(Groups(), Groups())))
    for width in _WIDTHS:
        plan = _plan(width, dist.get_world_size())
        took = [[_took(plan, way, out) for way in ways] for _ in range(turns)]
        middle = [sorted(took, key=lambda t: t[i].cpu)[turns // 2][i] for i in (0, 1)]
        walls = [sorted(t[i].wall for t in took)[turns // 2] for i in (0, 1)]
        figures = [f"{m.cpu:.2f}" for m in middle] + [f"{wall:.2f}" for wall in walls]
        if dist.get_rank() == 0:
            print("|".join([str(width), f"{plan.bytes_after / 1e6:.0f}", *figures]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
