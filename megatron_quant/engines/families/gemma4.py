"""Gemma-4."""

from megatron_quant.engines.families.record import Dense, Family

FAMILY = Family(
    title="Gemma-4",
    classes=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    kinds=("gemma4", "gemma4_text"),
    dense=(Dense(names=r"per_layer_.*", source="vLLM gemma4.py: small, of no GEMM"),),
)
