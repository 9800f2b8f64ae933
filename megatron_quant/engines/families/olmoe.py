"""OLMoE."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="OLMoE",
    classes=("OlmoeForCausalLM",),
    kinds=("olmoe",),
)
