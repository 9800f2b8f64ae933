"""Kimi-Linear and Kimi-K3: Kimi delta attention."""

from megatron_quant.engines.families.record import Dense, Family, Fused

FAMILY = Family(
    title="Kimi-Linear, Kimi-K3",
    classes=("KimiLinearForCausalLM", "KimiK3ForConditionalGeneration"),
    kinds=("kimi_linear", "kimi_k3"),
    dense=(
        Dense(
            names=r"self_attn\.(f_b|g_a|g_b)_proj\.weight",
            source="vLLM kimi_k3: small; every published recipe leaves them",
        ),
        Dense(
            names=r"block_sparse_moe\.routed_expert_(down|up)_proj\.weight",
            source="ModelOpt's Kimi-K3: the latent projections stay in bf16",
        ),
        Dense(names=r".*_res_proj\.weight", source="vLLM kimi_k3: quant_config=None"),
    ),
    loaded=(
        (r"self_attn\.forget_gate\.", "self_attn."),
        (r"mlp\.shared_experts\.", "block_sparse_moe.shared_experts."),
    ),
    fused=(
        Fused(
            name="in_proj_qkvgfab",
            members=("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "f_a_proj"),
            marks=("b_proj", "f_a_proj"),
        ),
        Fused(
            name="fused_qkv_a_g_proj",
            members=("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
            marks=("q_a_proj", "g_proj"),
        ),
    ),
)
