"""Kimi-K2.5: DeepSeek-V3's text decoder under ``language_model.``, beside a vision tower."""

from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config
from megatron_quant.models.decoder import Decoder
from megatron_quant.models.deepseek_v3 import DEEPSEEK_V3
from megatron_quant.models.drafts import NUMBERED
from megatron_quant.models.text import text_config

_TIED = "tie_word_embeddings"


def _decoder(config: Config) -> Decoder:
    # for the text decoder beside towers, the outer config says whether it is tied
    outer = {_TIED: config[_TIED]} if _TIED in config else {}
    return DEEPSEEK_V3.decoder({**text_config(config), **outer})


KIMI_K25 = Architecture(
    "KimiK25ForConditionalGeneration",
    _decoder,
    draft_names=NUMBERED,
    renamed=(("", "language_model."),),
)
