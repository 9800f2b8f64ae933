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
    forward="transformers renames what it reads, and its own files are not the hub's",
)
