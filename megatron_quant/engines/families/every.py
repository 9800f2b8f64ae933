"""Facts that hold for most families."""

from megatron_quant.engines.families.record import Called, Fused

FUSED = (
    Fused(name="qkv_proj", members=("q_proj", "k_proj", "v_proj")),
    Fused(name="gate_up_proj", members=("gate_proj", "up_proj")),
    Fused(name="gate_up_proj", members=("w1", "w3")),
    Fused(name="fused_qkv_a_proj", members=("q_a_proj", "kv_a_proj_with_mqa")),
)
"""vLLM's stacked parameters of Llama, Mixtral and DeepSeek, and of all that are built like them."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of config.json that count the experts of a layer."""
CALLED = (
    Called(
        modules=r"(.*\blayers\.\d+)\.shared_head\.head",
        engine=r"\1.head",
        source="vLLM deepseek_mtp.py, glm4_moe_mtp.py: the prefix of SharedHead",
        drafts=True,
    ),
)
"""What engines call otherwise in layers that predict tokens ahead."""
