"""Ernie-4.5."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="Ernie-4.5",
    classes=("Ernie4_5_MoeForCausalLM",),
    kinds=("ernie4_5_moe",),
)
