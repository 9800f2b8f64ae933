"""Check a live model's TransformerConfig: its weights must mean what the tables say.

Some settings change the order, names or mathematics of weights, but no shape. The export would be
wrong without an error. So only values that this library knows are let through.
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, SupportsFloat

from megatron_quant.errors import ArchitectureError

_NAMES = "gives the weights other names"
_ROWS = "orders the rows of linear_fc1 in another way"
_FUSER = "multiplies without the modules that carry quantizers"
_OTHER_MODEL = "computes what no supported Hugging Face model does"

# Megatron-Core 0.16 to 0.19. Name -> (values that are let through, what other values do).
KNOWN: Mapping[str, tuple[tuple[Any, ...], str]] = {
    # order of weights, and of the rows in them
    "moe_mlp_glu_interleave_size": ((None,), _ROWS),
    "moe_shared_expert_glu_interleave_size": ((None,), _ROWS),
    "rotary_interleaved": ((False,), "orders the rows of q and k in another way"),
    # places of weights
    "moe_single_grouped_weight": ((False,), "leaves a grouped linear no weight of each expert"),
    "moe_single_grouped_bias": ((False,), "leaves a grouped linear no bias of each expert"),
    "mla_down_proj_fusion": ((False,), "makes one linear of q_a_proj and kv_a_proj"),
    "use_grouped_gemm_for_dense_mlp": ((False,), _NAMES),
    "use_grouped_gemm_for_shared_expert": ((False,), _NAMES),
    "moe_use_legacy_grouped_gemm": ((False,), _NAMES),
    "heterogeneous_block_specs": ((False,), "gives layers shapes of their own"),
    "mtp_use_repeated_layer": ((False,), "gives layers for speculation the same weights"),
    # computation with weights
    "use_transformer_engine_op_fuser": ((False,), _FUSER),
    "use_inference_optimized_layers": ((False,), _FUSER),
    "use_kitchen": ((False,), "rounds what quantizers gave again"),
    "use_mup": ((False,), _OTHER_MODEL),
    "moe_apply_probs_on_input": ((False,), _OTHER_MODEL),
    "moe_latent_size": ((None,), _OTHER_MODEL),
    "moe_router_force_biased": ((None,), "routes at random"),
    "moe_router_force_load_balancing": ((False,), "routes at random"),
    "apply_residual_connection_post_layernorm": ((False,), _OTHER_MODEL),
    "qk_l2_norm": ((False,), _OTHER_MODEL),
    "no_rope_freq": ((None,), _OTHER_MODEL),
    "softmax_scale": ((None,), _OTHER_MODEL),
    "is_hybrid_model": ((False,), _OTHER_MODEL),
}
# Settings that config.json decides and that can differ without changing a shape; with their values
# if the table of an architecture does not name them.
_DECIDED: Mapping[str, Any] = {
    "num_attention_heads": None,
    "normalization": "RMSNorm",
    "layernorm_epsilon": None,
    "gated_linear_unit": True,
    "activation_func": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "softmax_type": "vanilla",
    "num_moe_experts": None,
    "layernorm_zero_centered_gamma": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
}
_OF_DELTA_NETS = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
_OF_EXPERTS = ("moe_router_topk", "moe_router_score_function")
_OF_GROUPED_QUERIES = ("num_query_groups", "kv_channels")
_OF_LATENTS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


def check_settings(config: Any, described: Mapping[str, Any]) -> None:
    """Raise ArchitectureError for a value of a TransformerConfig that the tables do not know.

    described: the result of ``Architecture.megatron_config`` for the model's config.json.
    """
    for name, (allowed, why) in KNOWN.items():
        value = getattr(config, name, allowed[0])
        if not any(value is known or value == known for known in allowed):
            raise ArchitectureError(
                f"{name}={_spelled(value)} in the TransformerConfig {why}, which this library does "
                f"not export: build the model with {name}={allowed[0]}"
            )
    latent = described.get("multi_latent_attention", False)
    chosen = [*_DECIDED, *_OF_EXPERTS]
    if described.get("moe_router_score_function") == "softmax":
        chosen.append("moe_router_pre_softmax")
    for name in (*chosen, *_OF_DELTA_NETS, *(_OF_LATENTS if latent else _OF_GROUPED_QUERIES)):
        if name in described or name in _DECIDED:
            wanted = described.get(name, _DECIDED.get(name))
            value = getattr(config, name, _DECIDED.get(name))
            _check_decided(name, _pattern(value, wanted), wanted)


def _pattern(value: Any, described: Any) -> Any:
    """Return the layers that every n-th is full attention of, where ``described`` lists layers."""
    if type(value) is not int or not isinstance(described, list):
        return value
    return [int((i + 1) % value != 0) for i in range(len(described))]


def check_said(said: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    """Run :func:`check_settings` on those settings alone that a document says."""
    check_settings(SimpleNamespace(**{**_DECIDED, **described, **said}), described)


def _check_decided(name: str, value: Any, described: Any) -> None:
    if not _same(value, described):
        raise ArchitectureError(
            f"{name}={_spelled(value)} in the TransformerConfig, but config.json makes it "
            f"{_spelled(described)}: give the config.json of this very model"
        )


def _same(value: Any, described: Any) -> bool:
    """Return whether two values mean the same: numbers of any type, activations by name.

    A number still equals its fp32 rounding.
    """
    if callable(described):
        name = _spelled(value).strip("'").lower()
        return _SPELLINGS.get(name, name) == _spelled(described)
    if isinstance(value, SupportsFloat) and isinstance(described, SupportsFloat):
        return math.isclose(float(value), float(described), rel_tol=1e-6)
    return bool(value == described)


_SPELLINGS = {"swish": "silu", "quickgelu": "quick_gelu", "quickgeluactivation": "quick_gelu"}


def _spelled(value: Any) -> str:
    """Name a function or module by its name: one activation has several definitions."""
    if not callable(value):
        return repr(value)
    # scripted functions have their own name in "name", and their class's in "__name__"
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    return str(name or type(value).__name__)
