"""MiMo-V2-Flash: sliding layers with heads of their own."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="MiMo-V2-Flash",
    classes=("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
    kinds=("mimo_v2_flash", "mimo_v2"),
)
