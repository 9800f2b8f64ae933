"""Qwen3-Next: gated delta nets whose projections are stored fused."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="Qwen3-Next",
    classes=("Qwen3NextForCausalLM",),
    kinds=("qwen3_next",),
    head_reason="vLLM builds its output layer without a quantization config",
)
