"""DeepSeek-V4: compressed attention, hash layers, names without a prefix."""

from megatron_quant.engines.families.record import Dense, Family, Fused

FAMILY = Family(
    title="DeepSeek-V4",
    classes=("DeepseekV4ForCausalLM",),
    kinds=("deepseek_v4",),
    embedding="embed",
    head="head",
    dense=(
        Dense(
            names=r"attn\.(indexer\.)?(weights_proj|compressor\.(wkv|wgate))\.weight",
            source="vLLM deepseek_v4.py: compressor.fused_wkv_wgate and indexer.weights_proj",
        ),
        Dense(
            names=r"attn\.wo_a\.weight",
            source="vLLM deepseek_v4.py: a block-diagonal matrix, whose groups of rows see "
            "different inputs",
        ),
        Dense(names=r"hc_(attn|ffn)_fn", source="vLLM deepseek_v4.py: hyper-connections in fp32"),
    ),
    fused=(Fused(name="fused_wqa_wkv", members=("wq_a", "wkv"), marks=("wq_a",)),),
    head_reason="vLLM builds its output layer without a quantization config",
    vllm_reason="vLLM reads DeepSeek-V4 in the form of its release alone (quant_method fp8, and "
    "moe_quant_algo for experts in NVFP4)",
    loaded=(
        (r"self_attn\.compressor\.indexer\.q_b_proj\.", "attn.indexer.wq_b."),
        (r"self_attn\.(q|o)_(a|b)_proj\.", r"attn.w\1_\2."),
        (r"self_attn\.kv_proj\.", "attn.wkv."),
        (r"mlp\.shared_experts\.gate_proj\.", "ffn.shared_experts.w1."),
        (r"mlp\.shared_experts\.down_proj\.", "ffn.shared_experts.w2."),
        (r"mlp\.shared_experts\.up_proj\.", "ffn.shared_experts.w3."),
    ),
)
