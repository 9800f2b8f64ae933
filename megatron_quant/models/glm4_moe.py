"""GLM-4.5, 4.6 and 4.7, and the smaller GLM-4.7-Flash, whose attention is DeepSeek-V3's.

They are transformers' Glm4MoeForCausalLM and Glm4MoeLiteForCausalLM. Their experts have the names
and the router of DeepSeek-V3.
"""

from dataclasses import replace

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config, flag, read_decoder, read_partial_rope
from megatron_quant.models.decoder import Decoder
from megatron_quant.models.deepseek_v3 import read_latent_mixture
from megatron_quant.models.drafts import NUMBERED
from megatron_quant.models.sigmoid import read_experts

# Values of keys that config.json lacks, of Glm4MoeConfig and Glm4MoeLiteConfig
_DEFAULTS = {
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
_LITE_DEFAULTS = {
    **_DEFAULTS,
    "rope_interleave": True,
    "q_lora_rank": 768,
    "routed_scaling_factor": 1.8,
}


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    rope = read_partial_rope(config, part=0.5)
    normed = flag(config, "use_qk_norm")
    # of the linears of attention, only q, k and v get the bias
    decoder = read_decoder({**config, "attention_bias": False}, qk_norm=normed, rope=rope)
    experts = read_experts(config, decoder.layers, dense=1)
    return replace(decoder, experts=experts, qkv_bias=flag(config, "attention_bias"))


def _lite_decoder(config: Config) -> Decoder:
    return read_latent_mixture({**_LITE_DEFAULTS, **config}, dense=1)


GLM4_MOE = Architecture("Glm4MoeForCausalLM", _decoder, draft_names=NUMBERED)
GLM4_MOE_LITE = Architecture("Glm4MoeLiteForCausalLM", _lite_decoder, draft_names=NUMBERED)
