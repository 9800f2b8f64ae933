"""AFMoE (Trinity)."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="Trinity (AFMoE)",
    classes=("AfmoeForCausalLM",),
    kinds=("afmoe",),
)
