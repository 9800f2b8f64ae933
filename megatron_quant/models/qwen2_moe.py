"""Qwen2-MoE (Qwen1.5-MoE too): transformers' Qwen2MoeForCausalLM."""

from dataclasses import replace

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import (
    Config,
    check_routing,
    flag,
    full_attention,
    positive,
    read_decoder,
)
from megatron_quant.models.decoder import Decoder, ExpertNames, Experts
from megatron_quant.models.qwen3_moe import expert_layers

# what Qwen2MoeConfig gives to keys that config.json lacks
_DEFAULTS = {"rope_theta": 10000.0, "sliding_window": 4096, "qkv_bias": True}

_NAMES = ExpertNames(
    router="mlp.gate",
    gate="mlp.experts.{expert}.gate_proj",
    up="mlp.experts.{expert}.up_proj",
    down="mlp.experts.{expert}.down_proj",
    shared="mlp.shared_expert",
    shared_gate="mlp.shared_expert_gate",
)


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    decoder = read_decoder(config, qk_norm=False)
    if flag(config, "use_sliding_window"):
        full_attention(config, config["sliding_window"])
    # transformers >= 5 saves the number under Mixtral's name
    count = positive(config, "num_experts" if "num_experts" in config else "num_local_experts")
    experts = Experts(
        count=count,
        topk=positive(config, "num_experts_per_tok"),
        ffn=positive(config, "moe_intermediate_size"),
        layers=expert_layers(config, decoder.layers, "Qwen2ForCausalLM, for --stream"),
        normalized=flag(config, "norm_topk_prob"),
        names=_NAMES,
        shared_ffn=positive(config, "shared_expert_intermediate_size"),
    )
    check_routing(experts)
    return replace(decoder, experts=experts, qkv_bias=flag(config, "qkv_bias"))


QWEN2_MOE = Architecture("Qwen2MoeForCausalLM", _decoder)
