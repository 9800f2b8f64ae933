"""HunYuan-MoE-V1."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="HunYuan-A13B",
    classes=("HunYuanMoEV1ForCausalLM",),
    kinds=("hunyuan_v1_moe",),
    plain_router=False,
)
