"""A rank holds about twice its largest tensor while it writes, measured from outside."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import torch
from megatron_quant.ckpt.plan.sidecars import Companions
from megatron_quant.ckpt.dialects import get_dialect
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.ckpt.write.pipeline import WriteOptions
from megatron_quant.ckpt.plan.export_plan import plan_export
from megatron_quant.ckpt.plan.placing import StorageRules
from megatron_quant.ckpt.write import rank_work as parts
from megatron_quant.ckpt.write.exporter import Destination, export
from megatron_quant.dist import Groups
from megatron_quant.models.spec import Parallel, Param, Role, Source
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot

def peak():
    # Not ru_maxrss: that starts with the peak of the process that this one was forked from.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def param(number, rows):
    name = f"model.layers.{number}.weight"
    shape = (rows, 1024)
    return Param(
        name=name,
        sources=(Source(name, shape),),
        shape=shape,
        role=Role.LINEAR,
        parallel=Parallel.REPLICATED,
    )

def export_to(directory, rows, count, threads):
    params = [param(number, rows) for number in range(count)]
    slots = [Slot(name=p.name, sources=(p.sources[0].module,), shape=p.shape) for p in params]
    quant = QuantPlan("plain", tuple(Decision(slot=slot, rule="test") for slot in slots))
    layout = Layout.simulate(1, 1, 1, 1)
    plan = plan_export(
        params, quant, layout, StorageRules(
dialect=get_dialect("modelopt"),
dtype=torch.bfloat16,
max_shard_bytes=10**9,
)
    )

    def produce(part):
        (piece,) = part.pieces
        yield piece.entry, piece.box, torch.full(piece.box.size, 1.0, dtype=torch.bfloat16)

    options = WriteOptions(threads, False)
    to = Destination(directory=directory, companions=Companions(documents={}), options=options)
    export(plan, Groups(), produce, to)

parts.SMALL_BYTES = 0  # the tensors here are small, so as to be quick
out = Path(sys.argv[1])
export_to(out / "warm", 64, 4, 4)
before = peak()
export_to(out / "large", 8 * 1024, 10, 4)
print(peak() - before)
"""
LARGEST = 8 * 1024 * 1024 * 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak memory to read")
def test_at_most_about_two_of_the_largest_tensor(tmp_path: Path) -> None:
    run = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held = int(done.stdout)
    assert LARGEST < held < 2.7 * LARGEST, held / LARGEST
