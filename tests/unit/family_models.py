"""Tiny checkpoints of the families that people quantize, with the names that the hub has.

They are made with transformers' own classes where it has them. Saving one is not neutral: names and
keys of config.json that only the hub's files have are put back here.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers as t
from safetensors.torch import load_file, save_file

from tests.unit.hf_models import BASE, DEEPSEEK, EXPERTS, MODELS, VISION

WEIGHTS = "model.safetensors"
GATED = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
Make = Callable[[], t.PreTrainedModel]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A small model of one family.

    make: builds it with transformers' classes. renames: (pattern, replacement) from the names that
    it saves to the hub's. config: keys of config.json as the hub has them; None removes one.
    added: tensors that transformers' model has not. count: (key, experts). experts: name of the
    module of routed experts in an export. leaves: linears of an expert there. router: its tensor.
    dense: weights that no recipe may quantize. forward: whether transformers runs what was renamed.
    """

    make: Make
    experts: str
    router: str
    count: tuple[str, int]
    leaves: tuple[str, ...] = GATED
    renames: tuple[tuple[str, str], ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    added: Shapes = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    forward: bool = True


def causal(name: str, settings: Mapping[str, object]) -> Make:
    return lambda: getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**settings))


LATENT = {k: v for k, v in DEEPSEEK.items() if k != "rope_interleave"}
SPARSE = LATENT | {
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 8,
    "head_dim": 16,
    "n_group": 1,
    "mlp_layer_types": ["dense", "sparse"],
}
INDEXER = "model.layers.0.self_attn.indexer"
QWEN3_VL = (
    BASE
    | EXPERTS
    | {
        "num_experts": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
    }
)
QWEN3_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def _qwen3_vl_moe() -> t.PreTrainedModel:
    config = t.Qwen3VLMoeConfig(text_config=QWEN3_VL, vision_config=QWEN3_VISION)
    return t.Qwen3VLMoeForConditionalGeneration(config)


FAMILIES: dict[str, Tiny] = {
    "qwen3_next": Tiny(
        make=MODELS["qwen3_next"],
        experts="model.layers.0.mlp.experts",
        router="model.layers.0.mlp.gate",
        count=("num_experts", 4),
        dense=("model.layers.0.linear_attn.in_proj_ba", "model.layers.0.mlp.shared_expert_gate"),
    ),
    "glm_moe_dsa": Tiny(
        make=causal("GlmMoeDsa", SPARSE),
        experts="model.layers.1.mlp.experts",
        router="model.layers.1.mlp.gate",
        count=("n_routed_experts", 4),
        dense=(f"{INDEXER}.wk", f"{INDEXER}.weights_proj"),
    ),
    "deepseek_v32": Tiny(
        make=causal("DeepseekV32", SPARSE),
        experts="model.layers.1.mlp.experts",
        router="model.layers.1.mlp.gate",
        count=("n_routed_experts", 4),
        dense=(f"{INDEXER}.wk", f"{INDEXER}.weights_proj"),
    ),
    "glm4_moe_lite": Tiny(
        make=causal("Glm4MoeLite", LATENT | {"mlp_layer_types": ["dense", "sparse"]}),
        experts="model.layers.1.mlp.experts",
        router="model.layers.1.mlp.gate",
        count=("n_routed_experts", 4),
    ),
    "qwen3_vl_moe": Tiny(
        make=_qwen3_vl_moe,
        experts="model.language_model.layers.0.mlp.experts",
        router="model.language_model.layers.0.mlp.gate",
        count=("num_experts", 4),
    ),
}
