"""GPT-OSS: transformers' GptOssForCausalLM.

Every linear has a bias, heads have sinks, windows alternate. The checkpoint stacks the experts of
a layer ([E, H, 2I], or MXFP4). Here they have the names that engines give to single ones.
"""

from dataclasses import replace

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import (
    Config,
    experts_of_all_layers,
    number,
    only,
    positive,
    read_decoder,
)
from megatron_quant.models.decoder import Decoder, ExpertNames, Window

# GptOssConfig's values of keys that config.json lacks
_DEFAULTS = {
    "rope_theta": 150000.0,
    "head_dim": 64,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "attention_bias": True,
}

_NAMES = ExpertNames(
    router="mlp.router",
    gate="mlp.experts.{expert}.gate_proj",
    up="mlp.experts.{expert}.up_proj",
    down="mlp.experts.{expert}.down_proj",
)
_KINDS = ("sliding_attention", "full_attention")


def _window(config: Config, layers: int) -> Window | None:
    if config["sliding_window"] is None:
        return None
    tokens = positive(config, "sliding_window")
    kinds = config.get("layer_types") or [_KINDS[i % 2] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in _KINDS for k in kinds):
        raise ArchitectureError(
            f"layer_types={shown(kinds)} in config.json must name one of {' and '.join(_KINDS)} "
            f"for each of {layers} layers"
        )
    windowed = tuple(kind == _KINDS[0] for kind in kinds)
    return Window(tokens, windowed) if any(windowed) else None


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    only(config, "attention_bias", (True,))
    only(config, "swiglu_alpha", (1.702,))  # Megatron-Core has the number in its code
    decoder = read_decoder({**config, "attention_bias": False}, qk_norm=False)
    experts = experts_of_all_layers(config, decoder, _NAMES)
    experts = replace(experts, clamp=number(config, "swiglu_limit"))
    window = _window(config, decoder.layers)
    return replace(decoder, experts=experts, biased=True, sinks=True, window=window)


GPT_OSS = Architecture("GptOssForCausalLM", _decoder)
