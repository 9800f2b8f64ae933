"""Run one export of a live model on all its ranks, and report its cost.

torchrun --nproc-per-node 4 -m benchmarks.live_ranks TOOL FORMAT FOLDER
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.exporters import FORMATS, Clock, peak_rss
from megatron_quant import cpu
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.ckpt.plan.shards import regions
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.models import lookup, num_experts

if TYPE_CHECKING:
    from megatron_quant.mcore.model.load import LiveModel


def _ours(folder: Path, fmt: str, clock: Clock) -> None:
    from megatron_quant.mcore.model.parallel import start_distributed
    from megatron_quant.runs.megatron import quantize_run as quantize
    from megatron_quant.runs.options import QuantizeOptions

    groups = start_distributed()
    dense = {"export_quant_cfg": str(folder / "dense.yaml"), "export_format": "compressed-tensors"}
    options = QuantizeOptions.from_flags(
        hf_model_id=str(folder / "source"),
        export_dir=folder / "out",
        weight_only=True,
        tp=groups.size,
        etp=groups.size,
        **FORMATS.get(fmt, dense),
    )
    quantize(options, groups, clock)


def _dcp(folder: Path, fmt: str, clock: Clock) -> None:
    from megatron_quant.mcore.model.load import load_model
    from megatron_quant.mcore.model.parallel import start_distributed

    groups, source = start_distributed(), open_source(folder / "source")
    architecture = lookup(source.config)
    experts = num_experts(architecture.params(source.config))
    layout = Layout.simulate(groups.size, groups.size, 1, groups.size, experts)
    with clock.time("load"):
        model = load_model(source, architecture, layout, groups, torch.bfloat16, lambda steps: None)
    with clock.time("export"):
        state = _state(model)
        writer = dcp.HuggingFaceStorageWriter(
            str(folder / "out"),
            fqn_to_index_mapping=dict.fromkeys(state, 1),
            save_distributed=True,
            enable_consolidation=True,
        )
        dcp.save(state, storage_writer=writer)
        dist.barrier()


def _state(model: "LiveModel") -> dict[str, torch.Tensor]:
    """Map Hugging Face names to what the rank holds of these tensors."""
    mesh = init_device_mesh("cpu", (model.groups.size,))
    state: dict[str, torch.Tensor] = {}
    for local in model.local:
        tensor = model.tensor(local).detach()
        for source, region in regions(local.param, local.shard_rank, local.shard_size):
            cut = [d for d, n in enumerate(region.size) if n != region.whole[d]]
            placed = Shard(cut[0]) if cut else Replicate()
            own = region.take(tensor).contiguous()
            state[source.name] = DTensor.from_local(own, mesh, [placed])
    return state


def main() -> None:
    """Run on every rank; print as JSON what all of them took."""
    tool, fmt, folder = sys.argv[1:]
    clock = Clock()
    if not torch.cuda.is_available():
        cpu.activate()
    (_dcp if tool == "DCP" else _ours)(Path(folder), fmt, clock)
    found = {"cpu": clock.cpu["export"], "wall": clock.wall["export"], "rss": peak_rss()}
    gathered: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        most = {key: max(f[key] for f in gathered) for key in ("wall", "rss")}
        print(json.dumps({"cpu": sum(f["cpu"] for f in gathered), **most}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
