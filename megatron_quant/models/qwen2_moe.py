"""Qwen2-MoE (Qwen1.5-MoE too): transformers' Qwen2MoeForCausalLM."""

from dataclasses import replace

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config, flag, positive
from megatron_quant.models.decoder import Decoder
from megatron_quant.models.qwen3_moe import NAMES, read_mixture

# Qwen2MoeConfig's values of keys that config.json lacks
_DEFAULTS = {"rope_theta": 10000.0, "sliding_window": 4096, "qkv_bias": True}

_NAMES = replace(NAMES, shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
_DENSE = "Qwen2ForCausalLM, for --stream"


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    decoder, experts = read_mixture(config, _NAMES, _DENSE, qk_norm=False)
    experts = replace(experts, shared_ffn=positive(config, "shared_expert_intermediate_size"))
    return replace(decoder, experts=experts, qkv_bias=flag(config, "qkv_bias"))


QWEN2_MOE = Architecture("Qwen2MoeForCausalLM", _decoder)
