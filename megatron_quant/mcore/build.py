"""A Megatron GPTModel from a Hugging Face config: Transformer Engine's layer spec, any TP x EP."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_quant import cpu
from megatron_quant.ckpt.layout import Layout
from megatron_quant.models import Architecture, padded_vocab


def transformer_config(
    architecture: Architecture, hf_config: Mapping[str, Any], layout: Layout, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's config of the model at ``layout``, for inference and calibration in ``dtype``."""
    host = {} if torch.cuda.is_available() else cpu.transformer_config_overrides()
    settings = {
        "tensor_model_parallel_size": layout.tp_size,
        "expert_model_parallel_size": layout.ep_size,
        "expert_tensor_parallel_size": layout.etp_size,
        # Megatron's own rule where tensor and expert parallelism meet.
        "sequence_parallel": layout.tp_size > 1,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "perform_initialization": False,  # every weight comes from the checkpoint
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        **host,
        **architecture.megatron_config(hf_config),
    }
    return TransformerConfig(**settings)


def build_model(
    architecture: Architecture, hf_config: Mapping[str, Any], layout: Layout, dtype: torch.dtype
) -> GPTModel:
    """This rank's part of the model, in eval mode, its weights not yet filled."""
    model_parallel_cuda_manual_seed(0)
    config = transformer_config(architecture, hf_config, layout, dtype)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    arguments = architecture.gpt_config(hf_config)
    arguments["vocab_size"] = padded_vocab(arguments["vocab_size"], layout.tp_size)
    model = GPTModel(config=config, transformer_layer_spec=spec, **arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device=device, dtype=dtype).eval()
