"""LFM2-MoE: short convolutions and attention."""

from megatron_quant.engines.families.record import Family, Fused

FAMILY = Family(
    title="LFM2-MoE",
    classes=("Lfm2MoeForCausalLM",),
    kinds=("lfm2_moe",),
    fused=(Fused(name="w13", members=("w1", "w3")),),
    plain_router=False,
)
