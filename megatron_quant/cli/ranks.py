"""The ranks of verbs that need no model."""

import torch.distributed as dist

from megatron_quant.dist import Groups
from megatron_quant.rendezvous import is_one_of_many, join


def start_ranks(minutes: float) -> Groups:
    """Join all ranks that ``torchrun`` started, over gloo; one process without it.

    minutes: how long a rank waits for the slowest.
    """
    if not dist.is_initialized() and is_one_of_many():
        join("gloo", minutes)
    return Groups(minutes=minutes)
