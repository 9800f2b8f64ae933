"""Megatron-Core: gathering a different number of rows from each rank does not work on gloo.

The alltoall dispatcher does so with expert tensor parallelism.

    torchrun --nproc-per-node 2 docs/upstream/megatron_gloo_uneven.py
"""

import tiny_moe as tiny

# isort: split
import importlib

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings

importlib.reload(mappings)  # Megatron's own functions again
dist.init_process_group("gloo")
rank, sizes = dist.get_rank(), [3, 1]
rows = torch.full((sizes[rank], 4), float(rank))
try:
    mappings._gather_along_first_dim(rows, dist.group.WORLD, sizes)
    error = ""
except Exception as e:
    error = f"{type(e).__name__}: {str(e).splitlines()[0]}"
tiny.finish("four rows on both ranks", error or "four rows", bool(error))
