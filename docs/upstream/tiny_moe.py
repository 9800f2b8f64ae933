"""A tiny Megatron MoE with grouped experts on gloo ranks, for the scripts beside this file.

Run them with torchrun. On a host without a GPU Transformer Engine's own Python runs on CPU tensors.
"""

import sys
from importlib import metadata

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    from megatron_quant import cpu

    cpu.activate()
    HOST = cpu.transformer_config_overrides()
else:
    HOST = {}

from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

IDS = torch.arange(32).view(2, 16) * 7 % 128


def start(tp: int, ep: int, etp: int) -> None:
    """Process groups and random states."""
    dist.init_process_group("gloo")
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    model_parallel_cuda_manual_seed(1234)


def model(softmax_type: str = "vanilla") -> GPTModel:
    """Two layers of four experts, this rank's part."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        ffn_hidden_size=96,
        num_moe_experts=4,
        moe_ffn_hidden_size=32,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        softmax_type=softmax_type,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        expert_model_parallel_size=mpu.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=mpu.get_expert_tensor_parallel_world_size(),
        sequence_parallel=mpu.get_tensor_model_parallel_world_size() > 1,
        **HOST,
    )
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=4, moe_grouped_gemm=True)
    return GPTModel(config, spec, vocab_size=128, max_sequence_length=64)


def forward(built: GPTModel) -> None:
    """One batch, equal on all ranks."""
    positions = torch.arange(16).expand(2, 16)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    built(*(t.to(next(built.parameters()).device) for t in (IDS, positions, mask)))


def gathered(value: object) -> list[object]:
    """``value`` of every rank."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def finish(expected: str, found: str, fault: bool) -> None:
    """Print what was expected and found; exit with 0 where the fault shows, with 1 where not."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        names = ("nvidia-modelopt", "megatron-core", "transformer_engine", "transformers", "torch")
        print(", ".join(f"{name} {metadata.version(name)}" for name in names))
        print(f"expected: {expected}\nfound:    {found}\n{'FAULT' if fault else 'no fault'}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(0 if fault else 1)
