"""Training checkpoints without quantizers, saved in the ranks of a test by megatron-core's own code.

Import it in functions that run under the ``ranks`` fixture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_quant.models import Pipeline


@dataclass(frozen=True)
class Training:
    """How a run saves.

    sizes: tp, ep and etp. stacked: one key for all layers, and one for all experts. padding: rows
    to a multiple of which, times tp, its vocabulary is padded; 0 for the least. beside: whether
    optimizer, rng and extra states go along. common: whether there is a ``common.pt``. narrow:
    whether every weight is in ``dtype``, as Megatron's Float16Module leaves it.
    """

    sizes: tuple[int, int, int] = (1, 1, 1)
    pipeline: Pipeline = Pipeline()
    stacked: bool = False
    padding: int = 0
    beside: bool = False
    common: bool = True
    dtype: torch.dtype = torch.bfloat16
    narrow: bool = False


def save_run(source: Path, run: Path, how: Training, iteration: int = 3) -> None:
    """Save the weights of ``source`` as a training run leaves them in ``run``."""
    import torch.distributed as dist

    from megatron_quant.mcore.model import build
    from tests.dist.live import Parallelism, load

    if how.padding:
        build.padded_vocab = _padded(how.padding)
    model = load(source, Parallelism(*how.sizes, how.pipeline), how.dtype)
    if how.narrow:
        for chunk in model.chunks:
            chunk.to(how.dtype)
    folder = run / f"iter_{iteration:07d}"
    write(folder, {f"model{i}": chunk for i, chunk in enumerate(model.chunks)}, how)
    if dist.get_rank() == 0:
        (run / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
        if not how.common:
            (folder / "common.pt").unlink(missing_ok=True)  # newer releases write none


def _padded(multiple: int) -> Callable[[int, int], int]:
    return lambda vocab, tp: -(-vocab // (multiple * tp)) * multiple * tp


def write(folder: Path, chunks: dict[str, Any], how: Training = Training()) -> None:
    """``dist_checkpointing.save`` of the chunks, and of what lies beside in a run."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu

    metadata = {
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": not how.stacked,
    }
    state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in chunks.items()}
    if not how.beside:
        for name, of_chunk in state.items():
            state[name] = {k: v for k, v in of_chunk.items() if "_extra_state" not in k}
    state = {**state, **(_beside() if how.beside else {}), "iteration": 3}
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder))


def _beside() -> dict[str, Any]:
    """The optimizer's state of one parameter, and a generator's."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    rank = dist.get_rank()
    key = "optimizer.state.exp_avg.embedding.word_embeddings.weight"
    state = torch.full((3, 4), torch.nan)
    state = ShardedTensor.from_rank_offsets(key, state, replica_id=rank)
    return {
        "optimizer": {key: state},
        "rng_state": ShardedObject("rng_state", [1, 2], (1,), (0,), replica_id=rank),
    }


def save_with_drafts(source: Path, run: Path) -> None:
    """Save the weights of ``source`` and of its layers for speculation, as one rank has them."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_quant.ckpt.plan import Layout
    from megatron_quant.ckpt.read import fill, open_source
    from megatron_quant.mcore.model.build import transformer_config
    from megatron_quant.mcore.model.parallel import start_distributed, start_megatron
    from megatron_quant.models import copies, lookup, num_experts

    weights = open_source(source)
    architecture, count = lookup(weights.config), weights.config["num_nextn_predict_layers"]
    params = architecture.params(weights.config)
    layout = Layout.simulate(1, 1, 1, 1, num_experts(params))
    start_megatron(layout, start_distributed().minutes)
    model_parallel_cuda_manual_seed(0)
    config = transformer_config(architecture, weights.config, layout, torch.bfloat16)
    config.mtp_num_layers = count
    layers = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layers,
        mtp_block_spec=get_gpt_mtp_block_spec(config, layers, use_transformer_engine=True),
        **architecture.gpt_config(weights.config),
    )
    for parameter in model.parameters():  # a router's bias stays in fp32
        parameter.data = parameter.data.bfloat16()
    known = {}
    for param in (*params, *architecture.drafts(weights.config, count)):
        name = param.name
        if not hasattr(model.mtp.layers[0], "transformer_layer"):
            name = name.replace(".transformer_layer.", ".mtp_model_layer.")  # newer releases
        tensor = (model.get_buffer if param.fp32 else model.get_parameter)(name)
        fill(tensor, copies(param, 0, 1), weights)
        known[name] = param
    assert known.keys() >= {name for name, _ in model.named_parameters()}
    write(run, {"model": model})


def save_as_fsdp(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Save each tensor as Megatron-FSDP does: cut over all ranks, by rows, by torch alone."""
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors.items()}
    beside = {"optimizer": {"state": {"module.a": {"exp_avg": torch.ones(2)}}}, "iteration": 3}
    save({"model": {"module": state}, **beside}, storage_writer=FileSystemWriter(folder))


def read_back(source: Path, folder: Path) -> list[str]:
    """Save the model of ``source`` in both forms; names of tensors that are read as other values."""
    from megatron_quant.ckpt.read import open_source
    from megatron_quant.mcore.checkpoint import open_plain, open_torch_dist
    from megatron_quant.models import lookup, whole
    from tests.dist.live import load

    wanted = open_source(source)
    params = lookup(wanted.config).params(wanted.config)
    model, odd = load(source), []
    for stacked in (True, False):
        run = folder / f"stacked {stacked}"
        write(run, {"model": model.module}, Training(stacked=stacked))
        found = open_plain(open_torch_dist(run), wanted.config)
        assert set(found) == {s.name for p in params for s in p.sources}
        for name in found:
            box = whole(found.tensors[name].shape)
            if not torch.equal(found.read(name, box), wanted.read(name, box)):
                odd.append(f"{run.name}: {name}")
    return odd
