"""AFMoE (Trinity)."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="Trinity (AFMoE)",
    classes=("AfmoeForCausalLM",),
    kinds=("afmoe",),
    nameless_head="vLLM gives its output layer no name, so that no exclusion of lm_head finds it",
)
