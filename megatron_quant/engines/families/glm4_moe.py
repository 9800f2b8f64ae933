"""GLM-4.5 to GLM-4.7, and GLM-4.7-Flash with latent attention."""

from megatron_quant.engines.families.record import Family

FAMILY = Family(
    title="GLM-4.5, 4.6, 4.7 and 4.7-Flash",
    classes=("Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"),
    kinds=("glm4_moe", "glm4_moe_lite"),
)
