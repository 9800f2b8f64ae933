"""The loss of a student that learns a teacher's logits, with the vocabulary cut over ranks."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region


def divergence(
    student_BSV: torch.Tensor, teacher_BSV: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Return the mean KL(teacher || student) per token of logits that tensor parallelism cuts."""
    start = mpu.get_tensor_model_parallel_rank() * student_BSV.shape[-1]
    real = max(0, min(student_BSV.shape[-1], vocab_size - start))  # the rest pads the vocabulary
    student, teacher = (x[..., :real].float() for x in (student_BSV, teacher_BSV))
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    kl_BS = (log_p.exp() * (log_p - log_q)).sum(-1)
    return reduce_from_tensor_model_parallel_region(kl_BS).mean()


def log_softmax(logits_BSV: torch.Tensor) -> torch.Tensor:
    """Take the log-softmax, and its gradient, over the whole vocabulary."""
    group = mpu.get_tensor_model_parallel_group()
    largest = logits_BSV.detach().amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    total = SumOverShards.apply((logits_BSV - largest).exp().sum(-1, keepdim=True))
    return logits_BSV - largest - total.log()


class SumOverShards(torch.autograd.Function):
    """A sum that every rank uses in its own way, so that gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Sum [B, S, 1] over the ranks."""
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of all ranks' uses."""
        return _summed(grad)


def _summed(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    dist.all_reduce(out, group=mpu.get_tensor_model_parallel_group())
    return out
