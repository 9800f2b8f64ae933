"""Qwen3-VL-MoE: stacks that lie in one of two ways."""

from megatron_quant.engines.families.record import Family, Layout

FAMILY = Family(
    title="Qwen3-VL (MoE)",
    classes=("Qwen3VLMoeForConditionalGeneration",),
    kinds=("qwen3_vl_moe", "qwen3_vl_moe_text"),
    layout=Layout.EITHER,
    plain_router=False,
)
