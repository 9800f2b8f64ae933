"""Qwen3 dense: transformers' Qwen3ForCausalLM."""

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config, flag, full_attention, positive_or, read_decoder
from megatron_quant.models.decoder import Decoder

# what Qwen3Config gives to keys that config.json lacks
_DEFAULTS = {
    "rope_theta": 10000.0,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _window(config: Config, layers: int) -> int | None:
    """Tokens of the sliding window that some layer uses; None where none does."""
    if not flag(config, "use_sliding_window") or config["sliding_window"] is None:
        return None
    from_layer = positive_or(config, "max_window_layers", 0)
    windowed = ["sliding_attention" if i >= from_layer else "full" for i in range(layers)]
    kinds = config.get("layer_types") or windowed
    return config["sliding_window"] if "sliding_attention" in kinds else None


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    decoder = read_decoder(config, qk_norm=True)
    full_attention(config, _window(config, decoder.layers))
    return decoder


QWEN3 = Architecture("Qwen3ForCausalLM", _decoder)
