"""Kimi-K2.5: DeepSeek-V3's text decoder beside a vision tower."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="Kimi-K2.5",
    classes=("KimiK25ForConditionalGeneration",),
    kinds=("kimi_k25", "kimi_k2"),
)
