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
    optimizer, rng and extra states go along. common: whether there is a ``common.pt``.
    """

    sizes: tuple[int, int, int] = (1, 1, 1)
    pipeline: Pipeline = Pipeline()
    stacked: bool = False
    padding: int = 0
    beside: bool = False
    common: bool = True
    dtype: torch.dtype = torch.bfloat16


def save_run(source: Path, run: Path, how: Training, iteration: int = 3) -> None:
    """Save the weights of ``source`` as a training run leaves them in ``run``."""
    import torch.distributed as dist

    from megatron_quant.mcore.model import build
    from tests.dist.live import Parallelism, load

    if how.padding:
        build.padded_vocab = _padded(how.padding)
    model = load(source, Parallelism(*how.sizes, how.pipeline), how.dtype)
    folder = run / f"iter_{iteration:07d}"
    write(folder, {f"model{i}": chunk for i, chunk in enumerate(model.chunks)}, how)
    if dist.get_rank() == 0:
        (run / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
        if not how.common:
            (folder / "common.pt").unlink()


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
