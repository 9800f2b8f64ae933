"""Forwards of a Megatron model: logits over the whole vocabulary, on every rank."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel


def forward(model: GPTModel, ids_BS: torch.Tensor) -> torch.Tensor:
    """This rank's logits [B, S, V / tp] of token ids [B, S].

    Sequences are padded at the end to a multiple of the tensor-parallel size (sequence parallelism
    splits them); causal attention keeps the padding from what precedes it.
    """
    length = ids_BS.shape[1]
    pad = -length % mpu.get_tensor_model_parallel_world_size()
    ids = torch.nn.functional.pad(ids_BS, (0, pad)).to(next(model.parameters()).device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
    return model(ids, positions, mask.triu(1))[:, :length]


def full_logits(model: GPTModel, ids_BS: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits [B, S, vocab_size] in fp32, equal on all ranks of the tensor-parallel group."""
    local = forward(model, ids_BS).float().contiguous()
    size = mpu.get_tensor_model_parallel_world_size()
    shards = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(shards, local, group=mpu.get_tensor_model_parallel_group())
    return torch.cat(shards, -1)[..., :vocab_size]
