"""A Qwen3-MoE model that megatron-core alone builds and fills, as Megatron-LM does.

Import it in functions that run under the ``ranks`` fixture.
"""

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file

from megatron_quant import cpu

PAD_TO = 128
"""Megatron-LM's ``make_vocab_size_divisible_by``, of which it takes a multiple of times tp."""


def built(source: Path, tp: int, ep: int, **fields: Any) -> GPTModel:
    """The model of a checkpoint at tp x ep, in bf16; ``fields`` of TransformerConfig override."""
    hf = json.loads((source / "config.json").read_text())
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = _config(hf, tp, ep, fields)
    unit = PAD_TO * tp
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=True),
        vocab_size=-(-hf["vocab_size"] // unit) * unit,
        max_sequence_length=hf["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return model.to(torch.bfloat16).eval()


def _config(hf: dict[str, Any], tp: int, ep: int, fields: dict[str, Any]) -> TransformerConfig:
    layers = range(hf["num_hidden_layers"])
    settings: dict[str, Any] = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf["head_dim"],
        "ffn_hidden_size": hf["intermediate_size"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf["rms_norm_eps"],
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "num_moe_experts": hf.get("num_local_experts", hf.get("num_experts")),
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_pre_softmax": not hf["norm_topk_prob"],
        "moe_layer_freq": [int(i not in hf["mlp_only_layers"]) for i in layers],
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": tp > 1,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        **cpu.transformer_config_overrides(),
    }
    return TransformerConfig(**(settings | fields))


@torch.no_grad()
def filled(model: GPTModel, source: Path) -> GPTModel:
    """The checkpoint's weights in it; rows that pad the vocabulary hold what no file may show."""
    hf = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    first = mpu.get_expert_model_parallel_rank() * (
        hf.get("num_local_experts", hf.get("num_experts")) // mpu.get_expert_model_parallel_world_size()
    )
    for name, own in model.named_parameters():
        own.copy_(_value(name, weights, hf, size, rank, first, own))
    return model


def _value(
    name: str,
    weights: dict[str, torch.Tensor],
    hf: dict[str, Any],
    size: int,
    rank: int,
    first: int,
    own: torch.Tensor,
) -> torch.Tensor:
    ends = {"embedding": "model.embed_tokens", "output_layer": "lm_head"}
    if (end := ends.get(name.split(".")[0])) is not None:
        rows = torch.full((len(own) * size, own.shape[1]), 1000.0)
        rows[: hf["vocab_size"]] = weights[f"{end}.weight"]
        return rows.chunk(size)[rank]
    if name == "decoder.final_layernorm.weight":
        return weights["model.norm.weight"]
    _, _, number, *path = name.split(".")
    layer = f"model.layers.{number}"

    def of(module: str) -> torch.Tensor:
        return weights[f"{layer}.{module}.weight"]

    def gate_up(mlp: str, tp: int, at: int) -> torch.Tensor:
        return torch.cat([of(f"{mlp}.{m}_proj").chunk(tp)[at] for m in ("gate", "up")])

    leaf = ".".join(path)
    if leaf == "self_attention.linear_qkv.weight":
        groups = hf["num_key_value_heads"]
        parts = [of(f"self_attn.{p}_proj").view(groups, -1, own.shape[1]) for p in "qkv"]
        return torch.cat(parts, 1).view(-1, own.shape[1]).chunk(size)[rank]
    if leaf == "self_attention.linear_proj.weight":
        return of("self_attn.o_proj").chunk(size, 1)[rank]
    if leaf == "mlp.linear_fc1.weight":
        return gate_up("mlp", size, rank)
    if leaf == "mlp.linear_fc2.weight":
        return of("mlp.down_proj").chunk(size, 1)[rank]
    if leaf.startswith("mlp.experts.linear_fc"):
        linear, number = leaf.removeprefix("mlp.experts.").split(".weight")
        expert = f"mlp.experts.{first + int(number)}"
        return gate_up(expert, 1, 0) if linear == "linear_fc1" else of(f"{expert}.down_proj")
    return of(
        {
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
            "self_attention.q_layernorm.weight": "self_attn.q_norm",
            "self_attention.k_layernorm.weight": "self_attn.k_norm",
            "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
            "pre_mlp_layernorm.weight": "post_attention_layernorm",
            "mlp.router.weight": "mlp.gate",
        }[leaf]
    )
