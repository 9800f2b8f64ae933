"""Megatron-Core: a pipeline of two with virtual stages whose ends both have a size is not built.

python docs/upstream/megatron_uneven_virtual.py
"""

import tiny_moe as tiny

# isort: split
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

config = TransformerConfig(
    num_layers=12,
    hidden_size=64,
    num_attention_heads=4,
    pipeline_model_parallel_size=2,
    virtual_pipeline_model_parallel_size=2,
    num_layers_in_first_pipeline_stage=8,
    num_layers_in_last_pipeline_stage=4,
    pipeline_dtype=torch.float32,
)
try:
    found = f"offset {get_transformer_layer_offset(config, vp_stage=0, pp_rank=1)}"
except ZeroDivisionError as error:
    found = f"ZeroDivisionError: {error}"
tiny.finish(
    "the second stage starts at layer 4, as the config, which TransformerConfig takes, says",
    found,
    found.startswith("ZeroDivisionError"),
)
