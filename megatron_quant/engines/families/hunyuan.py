"""HunYuan-MoE-V1 and HY-V3."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="HunYuan-A13B, HY-V3",
    classes=("HunYuanMoEV1ForCausalLM", "HYV3ForCausalLM"),
    kinds=("hunyuan_v1_moe", "hy_v3"),
    plain_router=False,
)
