"""Llama-4."""

from megatron_quant.engines.families.record import Family, Layout

FAMILY = Family(
    title="Llama-4",
    classes=("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    kinds=("llama4", "llama4_text"),
    layout=Layout.TRANSPOSED,
)
