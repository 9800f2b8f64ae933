"""Qwen3.5 and Qwen3.6: gated delta nets with flat projections."""

from megatron_quant.engines.families.record import Dense, Family, Fused

FAMILY = Family(
    title="Qwen3.5, Qwen3.6",
    classes=(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5ForCausalLM",
    ),
    kinds=("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_text"),
    plain_drafts=("gptq",),  # vLLM qwen3_5_mtp.py: by any "-:" of quantization_config.dynamic
    dense=(
        Dense(
            names=r"linear_attn\.in_proj_(a|b|ba)\.weight",
            source="ModelOpt's default list; a scale of few rows that in_proj_ba shares",
        ),
        Dense(
            names=r".*\bshared_expert_gate\.weight",
            source="vLLM qwen2_moe.py: quant_config=None",
            router=True,
        ),
    ),
    fused=(
        Fused(name="in_proj_qkvz", members=("in_proj_qkv", "in_proj_z")),
        Fused(name="in_proj_ba", members=("in_proj_b", "in_proj_a")),
    ),
)
