"""Llama: transformers' LlamaForCausalLM."""

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config, read_decoder
from megatron_quant.models.decoder import Decoder

# LlamaConfig's values of keys that config.json lacks
_DEFAULTS = {"rope_theta": 10000.0}


def _decoder(config: Config) -> Decoder:
    return read_decoder({**_DEFAULTS, **config}, qk_norm=False)


LLAMA = Architecture("LlamaForCausalLM", _decoder)
