"""Facts about models, as data: which tensors read the output of which norm.

The names and the arithmetic are those of transformers 5.23 (``modeling_*.py``).
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How the norms of a model work.

    Attributes:
        mlp_norm: The norm before MLP and experts; that before attention is ``input_layernorm``.
        offset: What is added to a norm's stored weight: 1 where it is stored less 1.
        plain_values: Whether values reach ``o_proj`` in a linear way.
    """

    mlp_norm: str = "post_attention_layernorm"
    offset: float = 0.0
    plain_values: bool = True


_PLAIN = Family()
_LESS_ONE = Family(offset=1.0)
_GEMMA = Family("pre_feedforward_layernorm", 1.0)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3"), _PLAIN),
    **dict.fromkeys(("qwen3_moe", "glm4_moe", "dots1", "seed_oss", "smollm3"), _PLAIN),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"), _PLAIN),
    **dict.fromkeys(("hy_v3", "hunyuan_v1_moe", "minimax_m2", "mimo_v2_flash"), _PLAIN),
    **dict.fromkeys(("ernie4_5_moe", "qwen3_vl_moe_text"), _PLAIN),
    "afmoe": Family("pre_mlp_layernorm"),
    "olmoe": Family(plain_values=False),  # it may clip them
    **dict.fromkeys(("gemma", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _LESS_ONE),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
}
"""``model_type`` of the text decoder -> its norms."""

ATTENTION_NORM = "input_layernorm"
ATTENTIONS = ("self_attn.", "linear_attn.")
MLPS = ("mlp.", "block_sparse_moe.")
ATTENTION_READERS = re.compile(
    r"(self_attn|linear_attn)\.(q_proj|k_proj|v_proj|gate_proj|q_a_proj|kv_a_proj_with_mqa|in_proj_qkvz"
    r"|in_proj_ba|in_proj_qkv|in_proj_z|in_proj_a|in_proj_b)\.weight"
)
"""Tensors of attention that multiply the output of the norm before it."""
ATTENTION_OTHERS = re.compile(
    r"(self_attn|linear_attn)\.(o_proj|out_proj|q_b_proj|kv_b_proj|q_norm|k_norm|q_a_layernorm"
    r"|kv_a_layernorm|query_layernorm|key_layernorm|norm|conv1d)\.weight"
    r"|linear_attn\.(dt_bias|A_log)|self_attn\.(\w+\.bias|attention_sink_bias)"
)
"""Those that do not."""
_EXPERT = r"experts\.\d+|shared_experts?|shared_mlp"
MLP_READERS = re.compile(
    rf"(mlp|block_sparse_moe)\.((({_EXPERT})\.)?(gate_proj|up_proj|w1|w3)|gate|gate\.wg"
    r"|router\.gate|shared_expert_gate)"
    r"\.weight"
)
MLP_OTHERS = re.compile(rf"(mlp|block_sparse_moe)\.((({_EXPERT})\.)?(down_proj|w2)\.weight|.*bias)")
LATENT = (("self_attn.q_a_layernorm", "q_b_proj"), ("self_attn.kv_a_layernorm", "kv_b_proj"))
"""Norms within latent attention, and what reads them."""
GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Linears of a gated MLP: the second's outputs are multiplied into the third's inputs."""
