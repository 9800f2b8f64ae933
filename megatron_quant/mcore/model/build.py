"""Build a Megatron GPTModel from a Hugging Face config, with Transformer Engine's layer spec."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.extensions.transformer_engine import TERowParallelGroupedLinear
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_quant import cpu
from megatron_quant.ckpt.plan import Layout
from megatron_quant.mcore.model.parallel import virtual_size
from megatron_quant.models import Architecture, padded_vocab

LAYER_NAME = re.compile(r".*\blayers\.\d+\.")
"""What stands before a parameter's name in its layer."""


def transformer_config(
    architecture: Architecture,
    hf_config: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype,
    mtp: int = 0,
) -> TransformerConfig:
    """Make Megatron's config at ``layout``, for inference and calibration in ``dtype``.

    mtp: layers for speculation.
    """
    host = {} if torch.cuda.is_available() else cpu.transformer_config_overrides()
    settings = {
        "tensor_model_parallel_size": layout.tp_size,
        "context_parallel_size": layout.cp_size,
        "expert_model_parallel_size": layout.ep_size,
        "expert_tensor_parallel_size": layout.etp_size,
        **_pipeline(layout, dtype),
        # Megatron requires it if tensor and expert parallelism are combined.
        "sequence_parallel": layout.tp_size > 1,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "perform_initialization": False,  # every weight comes from the checkpoint
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "mtp_num_layers": mtp or None,
        **host,
        **architecture.megatron_config(hf_config),
    }
    latent = settings.get("multi_latent_attention", False)
    config = (MLATransformerConfig if latent else TransformerConfig)(**settings)
    vars(config).update(architecture.config_attributes(hf_config))
    return config


def _pipeline(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """Return the settings that make Megatron deal the layers as ``layout`` does."""
    if layout.pp_size == 1:
        return {}
    counts = [sum(map(len, chunks)) for chunks in layout.stages]
    # Give only ends that differ: with virtual stages Megatron divides by the number of the others.
    ends = {end: counts[i] for end, i in (("first", 0), ("last", -1)) if counts[i] != counts[1]}
    return {
        "pipeline_model_parallel_size": layout.pp_size,
        "virtual_pipeline_model_parallel_size": virtual_size(layout),
        "pipeline_dtype": dtype,
        "variable_seq_lengths": True,  # stages send one another their shapes first
        # Without it, virtual stages mix up what two ranks send each other at the same time.
        "overlap_p2p_comm": virtual_size(layout) is not None,
        "batch_p2p_comm": virtual_size(layout) is None,
        **{f"num_layers_in_{end}_pipeline_stage": count for end, count in ends.items()},
    }


def build_model(
    architecture: Architecture,
    hf_config: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype,
    mtp: int = 0,
) -> tuple[GPTModel, ...]:
    """Build this rank's chunks of the model in eval mode, with weights not yet filled.

    There is one chunk, or one for each virtual pipeline stage. mtp: layers for speculation, which
    the last one has.
    """
    model_parallel_cuda_manual_seed(0)
    config = transformer_config(architecture, hf_config, layout, dtype, mtp)
    arguments = architecture.gpt_config(hf_config)
    arguments["vocab_size"] = padded_vocab(arguments["vocab_size"], layout.tp_size)
    count, pp = virtual_size(layout) or 1, mpu.get_pipeline_model_parallel_rank()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = architecture.params(hf_config)
    wide = frozenset(LAYER_NAME.sub("", param.live) for param in params if param.wide)
    chunks = []
    for number in range(count):
        vp_stage = number if count > 1 else None
        layers = _layers(config, vp_stage)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=layers,
            mtp_block_spec=_mtp(config, layers, vp_stage),
            pre_process=pp == 0 and number == 0,
            post_process=pp == layout.pp_size - 1 and number == count - 1,
            vp_stage=vp_stage,
            **arguments,
        )
        _mark_shards(chunk)
        chunks.append(_cast(chunk.to(device=device), dtype, wide).eval())
    return tuple(chunks)


def _cast(chunk: GPTModel, dtype: torch.dtype, wide: frozenset[str]) -> GPTModel:
    """Cast the parameters to ``dtype``; leave buffers, such as a router's bias, as they are.

    wide: names in a layer of those that become float32.
    """
    for name, parameter in chunk.named_parameters():
        kept = LAYER_NAME.sub("", name) in wide
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    return chunk


def _mark_shards(chunk: GPTModel) -> None:
    """Mark the weights whose values differ between tensor-parallel ranks.

    Megatron marks the vocabulary's when it initializes them, but here a checkpoint fills them.
    Transformer Engine does not mark experts' weights in every release. The norm of gradients counts
    an unmarked weight on one rank only.
    """
    for module in chunk.modules():
        if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear):
            weights = [module.weight]
        else:
            weights = [
                getattr(module, f"weight{i}") for i in range(getattr(module, "num_gemms", 0))
            ]
        for weight in weights:
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                dim = 1 if isinstance(module, TERowParallelGroupedLinear) else 0
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def _mtp(config: TransformerConfig, layers: Any, vp_stage: int | None) -> Any:
    """Return the spec of the layers for speculation of one chunk; None where it has none."""
    if config.mtp_num_layers is None:
        return None
    return get_gpt_mtp_block_spec(config, layers, use_transformer_engine=True, vp_stage=vp_stage)


def _layers(config: TransformerConfig, vp_stage: int | None) -> Any:
    """Return the spec of the layers of one chunk."""
    if config.experimental_attention_variant is not None:
        return get_transformer_block_with_experimental_attention_variant_spec(
            config, vp_stage=vp_stage
        )
    if config.num_moe_experts:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
