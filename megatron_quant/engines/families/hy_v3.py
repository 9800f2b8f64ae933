"""HY-V3."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="HY-V3",
    classes=("HYV3ForCausalLM",),
    kinds=("hy_v3",),
    loaded=((r"mlp\.shared_experts\.", "mlp.shared_mlp."),),
)
