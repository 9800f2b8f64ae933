"""Qwen3 dense: transformers' Qwen3ForCausalLM."""

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import (
    Config,
    fields,
    flag,
    full_attention,
    positive_or,
    read_decoder,
)
from megatron_quant.models.decoder import Decoder

# Qwen3Config's values of keys that config.json lacks
_DEFAULTS = {
    "rope_theta": 10000.0,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _is_windowed(config: Config, layers: int) -> bool:
    """Return whether some layer uses the sliding window."""
    if not flag(config, "use_sliding_window"):
        return False
    kinds = fields(config).texts("layer_types")
    if kinds:
        return "sliding_attention" in kinds
    return positive_or(config, "max_window_layers", 0) < layers


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    decoder = read_decoder(config, qk_norm=True)
    if _is_windowed(config, decoder.layers):
        full_attention(config)
    return decoder


QWEN3 = Architecture("Qwen3ForCausalLM", _decoder)
