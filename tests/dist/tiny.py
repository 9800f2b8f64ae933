"""A tiny GPTModel with Transformer Engine's layers, the same model at every layout.

Import it in functions that run under the ``ranks`` fixture, or after ``tests.host.ready()``.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_quant import cpu
from tests.dist.pieces import Piece

VOCAB = 128
# The fused norm of a Transformer Engine layer, under the name that the local layers give it.
_SAME = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def start(tp: int = 1, ep: int = 1, etp: int = 1, pp: int = 1) -> None:
    """Megatron's process groups and random states; needs an initialized torch.distributed."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)


def config(experts: int | None = 4, **fields: Any) -> TransformerConfig:
    """Two layers, grouped-query attention, SwiGLU; ``fields`` of TransformerConfig override."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    defaults: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 16,
        "ffn_hidden_size": 96,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": torch.float32,
        "perform_initialization": False,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
    }
    host = {} if torch.cuda.is_available() else cpu.transformer_config_overrides()
    return TransformerConfig(**(defaults | host | _moe(experts) | fields))


def _moe(experts: int | None) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": 32,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def model(c: TransformerConfig, layers: str = "te", tied: bool = False) -> GPTModel:
    """A filled model; ``layers`` is "te" or "local" (Megatron's own, SequentialMLP)."""
    experts = c.num_moe_experts
    if layers == "te":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts,
            moe_grouped_gemm=experts is not None,
            qk_layernorm=c.qk_layernorm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=experts,
            moe_grouped_gemm=False,
            qk_layernorm=c.qk_layernorm,
            normalization=c.normalization,
        )
    built = GPTModel(
        config=c,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )
    return fill(built.to(c.params_dtype))


def fill(built: GPTModel) -> GPTModel:
    """Give each shard its slice of a tensor that depends on its global name and shape alone."""
    with torch.no_grad():
        for tensor in _sharded(built):
            tensor.data.copy_(_global(tensor)[_box(tensor)].reshape(tensor.data.shape))
    return built


def pieces(built: GPTModel) -> list[Piece]:
    """What this rank holds of each parameter, under names that no layout changes."""
    return [
        Piece(t.key, tuple(t.global_shape), _box(t), t.data.detach().clone())
        for t in _sharded(built)
    ]


def gradients(built: GPTModel) -> list[Piece]:
    """The gradients of every parameter, as pieces; the parameters are overwritten by them.

    Summed over tensor-parallel ranks where Megatron's training loop does so, and averaged over
    the data-parallel ranks, which all see the same :func:`batch`.
    """
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        parameter.data.copy_(_reduced(name, parameter, parameter.grad))
    return pieces(built)


def _reduced(name: str, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if ".experts." in name:
        dist.all_reduce(gradient, group=parallel_state.get_expert_data_parallel_group())
        return gradient / parallel_state.get_data_parallel_world_size()
    of_a_head = "q_layernorm" in name or "k_layernorm" in name
    if getattr(parameter, "sequence_parallel", False) or of_a_head:
        dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient


def batch(sequences: int = 2, length: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (sequences, length), their positions, and a causal mask."""
    ids = (torch.arange(sequences * length) * 7 % VOCAB).view(sequences, length)
    positions = torch.arange(length).expand(sequences, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return ids, positions, mask


def logits(built: GPTModel, length: int = 16) -> torch.Tensor:
    """(sequences, length, VOCAB) of :func:`batch`, whole on every rank."""
    y = built(*batch(length=length)).detach().contiguous()
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(y) for _ in range(group.size())]
    dist.all_gather(shards, y, group=group)
    return torch.cat(shards, -1)


def loss(built: GPTModel) -> torch.Tensor:
    """The mean loss of :func:`batch` with itself as labels; a scalar that has a graph."""
    ids, positions, mask = batch()
    return built(ids, positions, mask, labels=ids).float().mean()


def _sharded(built: GPTModel) -> list[ShardedTensor]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    tensors = _flat(built.sharded_state_dict(metadata=metadata))
    return [t for t in tensors if t.data is not None and t.data.is_floating_point()]


def _flat(state: Any) -> Iterator[ShardedTensor]:
    """Every ShardedTensor in a nested sharded state dict; factories are built."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        for value in state:
            yield from _flat(value)
    elif isinstance(state, ShardedTensor):
        yield state
    elif hasattr(state, "build"):
        yield from _flat(state.build())


def _global(tensor: ShardedTensor) -> torch.Tensor:
    name = tensor.key
    for fused, plain in _SAME.items():
        name = name.replace(fused, plain)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(tensor.global_shape, generator=generator)
    return 1 + 0.1 * values if "norm" in name and "bias" not in name else 0.1 * values


def _box(tensor: ShardedTensor) -> tuple[slice, ...]:
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, shape, strict=True))
