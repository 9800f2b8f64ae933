"""HY-V3: transformers' HYV3ForCausalLM, Qwen3's attention with a sigmoid router."""

from dataclasses import replace

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config, only, read_decoder
from megatron_quant.models.decoder import Decoder
from megatron_quant.models.sigmoid import NAMES, read_experts

_SPELLED = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "routed_scaling_factor": "router_scaling_factor",
    "norm_topk_prob": "route_norm",
}
"""Keys of DeepSeek-V3's config, and what this one's are called."""

# Values of keys that config.json lacks: HYV3Config's, or those that every such model has
_DEFAULTS = {
    "rope_theta": 11_158_840.0,
    "num_shared_experts": 1,
    "router_scaling_factor": 2.826,
    "route_norm": True,
    "n_group": 1,
    "topk_group": 1,
}

_NAMES = replace(NAMES, router="mlp.router.gate", bias="mlp.expert_bias", shared="mlp.shared_mlp")


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    for key in ("qk_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias"):
        only(config, key, (True,))  # transformers builds no other
    if "moe_intermediate_size" not in config and "expert_hidden_dim" in config:
        config["moe_intermediate_size"] = config["expert_hidden_dim"]
    if "num_experts" not in config and "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    spelled = {key: config[own] for key, own in _SPELLED.items() if own in config}
    decoder = read_decoder(config, qk_norm=True)
    experts = read_experts({**config, **spelled}, decoder.layers, dense=1, names=_NAMES)
    return replace(decoder, experts=experts)


HY_V3 = Architecture("HYV3ForCausalLM", _decoder)
