"""DeepSeek-V3: transformers' DeepseekV3ForCausalLM, the class of Kimi-K2 and Moonlight too."""

from dataclasses import replace

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config, only, positive, read_decoder
from megatron_quant.models.decoder import Decoder
from megatron_quant.models.drafts import NUMBERED
from megatron_quant.models.latent import check_rotation, read_latent
from megatron_quant.models.sigmoid import read_experts

# DeepseekV3Config's values of keys that config.json lacks
_DEFAULTS = {
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "q_lora_rank": 1536,
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
}


def _decoder(config: Config) -> Decoder:
    return read_latent_mixture({**_DEFAULTS, **config}, dense=3)


def read_latent_mixture(config: Config, dense: int) -> Decoder:
    """Read a model with latent attention and experts as DeepSeek-V3 spells them.

    Args:
        config: Content of config.json with defaults filled in.
        dense: First layers without experts where config.json does not say how many.

    Raises:
        ArchitectureError: Names the key that is missing, malformed or not supported.
    """
    only(config, "num_key_value_heads", (positive(config, "num_attention_heads"),))
    latent = read_latent(config)
    decoder = read_decoder({**config, "head_dim": latent.nope + latent.rope}, qk_norm=True)
    check_rotation(config, decoder.rope)
    return replace(decoder, experts=read_experts(config, decoder.layers, dense), latent=latent)


DEEPSEEK_V3 = Architecture("DeepseekV3ForCausalLM", _decoder, draft_names=NUMBERED)
