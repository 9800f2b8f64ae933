"""Mixtral: transformers' MixtralForCausalLM."""

from dataclasses import replace

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import (
    Config,
    experts_of_all_layers,
    full_attention,
    read_decoder,
)
from megatron_quant.models.decoder import Decoder, ExpertNames

# MixtralConfig's values of keys that config.json lacks
_DEFAULTS = {"rope_theta": 1000000.0}

_NAMES = ExpertNames(
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{expert}.w1",
    up="block_sparse_moe.experts.{expert}.w3",
    down="block_sparse_moe.experts.{expert}.w2",
)


def _decoder(config: Config) -> Decoder:
    config = {**_DEFAULTS, **config}
    decoder = read_decoder(config, qk_norm=False)
    full_attention(config)
    return replace(decoder, experts=experts_of_all_layers(config, decoder, _NAMES))


MIXTRAL = Architecture("MixtralForCausalLM", _decoder)
