"""The ranks of verbs that need no model."""

import os

import torch.distributed as dist

from megatron_quant.dist import Groups


def start_ranks() -> Groups:
    """All ranks that ``torchrun`` started, which meet over gloo; one process without it."""
    if not dist.is_initialized() and "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    return Groups()
