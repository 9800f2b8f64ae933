"""Kimi-K2, and K2.5: DeepSeek-V3's text decoder, beside a vision tower."""

from megatron_quant.engines.families.record import Family, RunAs

FAMILY = Family(
    title="Kimi-K2.5",
    classes=("KimiK25ForConditionalGeneration",),
    kinds=("kimi_k25", "kimi_k2"),
    runs_as=(RunAs(of="kimi_k2", kind="deepseek_v3"),),
)
