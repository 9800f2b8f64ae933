"""Ling and Ring (Bailing MoE)."""

from megatron_quant.engines.families.record import Called, Family, Fused

FAMILY = Family(
    title="Ling, Ring (Bailing MoE 2.0 to 3)",
    classes=(
        "BailingMoeV2ForCausalLM",
        "BailingMoeV2_5ForCausalLM",
        "BailingMoeV3ForCausalLM",
        "BailingHybridForCausalLM",
    ),
    kinds=("bailing_moe_v2", "bailing_moe", "bailing_moe_linear", "bailing_hybrid"),
    embedding="word_embeddings",
    loaded=(
        (r"self_attn\.o_proj\.", "attention.dense."),
        (r"self_attn\.(forget_gate\.)?", "attention."),
    ),
    called=(
        Called(
            modules=r"(.*\blayers\.\d+)\.attention\.(.+)",
            engine=r"\1.self_attn.\2",
            source="vLLM bailing_moe_linear.py (2.5), bailing_moe_v3.py: the prefix of attention",
        ),
        Called(
            modules=r"(.*\blayers\.\d+)\.attention\.dense",
            engine=r"\1.self_attn.o_proj",
            source="vLLM bailing_moe_linear.py: so in layers with latent attention",
        ),
    ),
    fused=(
        Fused(
            name="qkvb_proj", members=("q_proj", "k_proj", "v_proj", "b_proj"), marks=("b_proj",)
        ),
    ),
    head_reason="engines normalize its output layer while they load it (norm_head), whatever it "
    "holds",
)
