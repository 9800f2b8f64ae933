"""Gemma-4."""

from megatron_quant.engines.families.record import Called, Dense, Family

FAMILY = Family(
    title="Gemma-4",
    classes=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    kinds=("gemma4", "gemma4_text"),
    called=(
        Called(
            modules=r"(.*\.self_attn)\.k_proj",
            engine=r"\1.v_proj",
            source="vLLM gemma4.py: with attention_k_eq_v, k_proj fills the part of v in qkv_proj",
        ),
    ),
    dense=(Dense(names=r"per_layer_.*", source="vLLM gemma4.py: small, of no GEMM"),),
)
