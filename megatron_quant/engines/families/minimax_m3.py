"""MiniMax-M3: attention to blocks that an indexer chooses."""

from megatron_quant.engines.families.record import Family, Fused

FAMILY = Family(
    title="MiniMax-M3",
    classes=("MiniMaxM3SparseForConditionalGeneration",),
    kinds=("minimax_m3_vl", "minimax_m3_vl_text"),
    loaded=(
        (r"mlp\.shared_experts\.", "block_sparse_moe.shared_experts."),
        (r"self_attn\.indexer\.(q|k)_proj\.", r"self_attn.index_\1_proj."),
    ),
    fused=(
        Fused(
            name="qkv_proj",
            members=("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"),
            marks=("index_q_proj",),
            whole_reason="vLLM takes a scale of a whole linear of q, k and v alone, and fuses the "
            "indexer's with them",  # PerTensorScaleParameter._shard_id_as_int asserts it
        ),
    ),
)
