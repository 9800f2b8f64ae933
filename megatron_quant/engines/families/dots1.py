"""dots.llm1."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="dots.llm1",
    classes=("Dots1ForCausalLM",),
    kinds=("dots1",),
)
