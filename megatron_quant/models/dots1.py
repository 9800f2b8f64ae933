"""dots.llm1: transformers' Dots1ForCausalLM, Qwen3's attention with DeepSeek-V3's experts."""

from dataclasses import replace

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config, fields, full_attention, positive_or, read_decoder
from megatron_quant.models.decoder import Decoder
from megatron_quant.models.sigmoid import read_experts

# Dots1Config's values of keys that config.json lacks
_DEFAULTS = {
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 4096,
    "max_window_layers": 62,
}


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    decoder = read_decoder(config, qk_norm=True)
    kinds = fields(config).texts("layer_types")
    windowed = positive_or(config, "max_window_layers", 0) < decoder.layers
    if "sliding_attention" in kinds if kinds else windowed:
        full_attention(config)
    return replace(decoder, experts=read_experts(config, decoder.layers, dense=0))


DOTS1 = Architecture("Dots1ForCausalLM", _decoder)
