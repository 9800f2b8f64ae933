"""Tensors that engines build without quantization, by family. No recipe quantizes them.

Engines load such tensors by the names of plain ones. Codes there raise an error; where only the
dtype differs, they load as wrong values without a word. Read in vLLM 0.32 and SGLang of August
2026.
"""

import re
from dataclasses import dataclass

from megatron_quant.models.spec import Role


@dataclass(frozen=True)
class Dense:
    """Tensors of a layer that stay as they are.

    Attributes:
        families: ``model_type`` of the models that have them.
        names: Pattern of the tensors' names in their layer.
        role: Their role.
        source: Where an engine says so.
    """

    families: tuple[str, ...]
    names: str
    role: Role
    source: str


DENSE = (
    Dense(
        ("deepseek_v32", "glm_moe_dsa"),
        r"self_attn\.indexer\.(wk|weights_proj)\.weight",
        Role.OTHER,
        "vLLM deepseek_v2.py: wk_weights_proj has quant_config=None; SGLang nsa_indexer.py",
    ),
    Dense(
        ("deepseek_v4",),
        r"attn\.(indexer\.)?(weights_proj|compressor\.(wkv|wgate))\.weight",
        Role.OTHER,
        "vLLM deepseek_v4.py: compressor.fused_wkv_wgate and indexer.weights_proj",
    ),
    Dense(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe"),
        r"linear_attn\.in_proj_(a|b|ba)\.weight",
        Role.OTHER,
        "ModelOpt's default list; a scale of few rows that in_proj_ba shares",
    ),
    Dense(
        ("qwen2_moe", "qwen3_next", "qwen3_5_moe"),
        r".*\bshared_expert_gate\.weight",
        Role.ROUTER,
        "vLLM qwen2_moe.py: quant_config=None",
    ),
    Dense(("gemma3n", "gemma4"), r"per_layer_.*", Role.OTHER, "vLLM gemma4.py: small, of no GEMM"),
)
_COMPILED = tuple((re.compile(row.names), row.role) for row in DENSE)


def dense_role(name: str) -> Role | None:
    """Return the role of a tensor that engines keep unquantized; None for any other.

    Args:
        name: Name in the layer. Names decide, as derived models have a ``model_type`` of their own.
    """
    return next((role for pattern, role in _COMPILED if pattern.fullmatch(name)), None)
