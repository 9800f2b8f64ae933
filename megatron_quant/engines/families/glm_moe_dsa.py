"""GLM-5 and DeepSeek-V3.2: latent attention with a sparse indexer."""

from megatron_quant.engines.families.record import Dense, Family

FAMILY = Family(
    title="GLM-5, DeepSeek-V3.2",
    classes=("GlmMoeDsaForCausalLM", "DeepseekV32ForCausalLM"),
    kinds=("glm_moe_dsa", "deepseek_v32"),
    dense=(
        Dense(
            names=r"self_attn\.indexer\.(wk|weights_proj)\.weight",
            source="vLLM deepseek_v2.py: wk_weights_proj has quant_config=None; SGLang "
            "nsa_indexer.py",
        ),
    ),
)
