"""Tiny checkpoints of the families that people quantize, with the names that the hub has.

They are made with transformers' own classes where it has them. Saving one is not neutral: names and
keys of config.json that only the hub's files have are put back here.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers as t
from safetensors.torch import load_file, save_file

from megatron_quant.engines.families import family_of
from megatron_quant.models import ARCHITECTURES
from megatron_quant.models.registry import UNBUILT
from tests.unit.hf_models import BASE, DEEPSEEK, EXPERTS, MODELS

WEIGHTS = "model.safetensors"
GATED = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
FP32 = r".*(score_correction_bias|expert_bias|router_bias|A_log|ffn\.gate\.bias)"
"""Names of tensors that checkpoints keep in fp32."""
Make = Callable[[], t.PreTrainedModel]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A small model of one family.

    make: builds it with transformers' classes. renames: (pattern, replacement) from the names that
    it saves to the hub's. config: keys of config.json as the hub has them; None removes one, and a
    dict adds to what is there.
    added: tensors that transformers' model has not. only: pattern of those that are taken of it.
    turned: of stacks that the hub has transposed. split: whether the hub has single linears of
    what is saved fused. nested: ``model_type`` of the text decoder, where its config is one within
    another. count: (key, experts). experts: name of the
    module of routed experts in an export. leaves: linears of an expert there. router: its tensor.
    dense: weights that no recipe may quantize. unmeasured: why transformers cannot run these files.
    """

    make: Make
    experts: str
    router: str
    count: tuple[str, int]
    leaves: tuple[str, ...] = GATED
    renames: tuple[tuple[str, str], ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    added: Shapes = field(default_factory=dict)
    only: str = ".*"
    turned: tuple[str, ...] = ()
    split: bool = False
    nested: str = ""
    dense: tuple[str, ...] = ()
    unmeasured: str = ""


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


def qwen3_vl_moe(inner: int = 32) -> t.PreTrainedModel:
    """With experts of ``inner`` features."""
    text = QWEN3_VL | {"moe_intermediate_size": inner}
    config = t.Qwen3VLMoeConfig(text_config=text, vision_config=QWEN3_VISION)
    return t.Qwen3VLMoeForConditionalGeneration(config)


MOE = BASE | EXPERTS
KEPT = {
    name: Tiny(make=MODELS[name], experts=at, router=router, count=count, **more)
    for name, at, router, count, more in (
        (
            "qwen3_next",
            "model.layers.0.mlp.experts",
            "model.layers.0.mlp.gate",
            ("num_experts", 4),
            {
                "dense": (
                    "model.layers.0.linear_attn.in_proj_ba",
                    "model.layers.0.mlp.shared_expert_gate",
                )
            },
        ),
        (
            "qwen3_5_moe",
            "model.layers.0.mlp.experts",
            "model.layers.0.mlp.gate",
            ("num_experts", 4),
            {"dense": ("model.layers.0.linear_attn.in_proj_a",)},
        ),
        (
            "gemma4",
            "model.language_model.layers.0.experts",
            "model.language_model.layers.0.router.proj",
            ("num_experts", 4),
            {},
        ),
        (
            "llama4",
            "model.layers.1.feed_forward.experts",
            "model.layers.1.feed_forward.router",
            ("num_local_experts", 4),
            {},
        ),
        (
            "gpt_oss",
            "model.layers.0.mlp.experts",
            "model.layers.0.mlp.router",
            ("num_local_experts", 4),
            {},
        ),
        (
            "glm4_moe",
            "model.layers.1.mlp.experts",
            "model.layers.1.mlp.gate",
            ("n_routed_experts", 4),
            {},
        ),
    )
}
V3 = {"experts": "model.layers.1.mlp.experts", "router": "model.layers.1.mlp.gate"}
ROUTED = ("n_routed_experts", 4)
FAMILIES: dict[str, Tiny] = {
    **KEPT,
    "glm_moe_dsa": Tiny(
        make=causal("GlmMoeDsa", SPARSE),
        **V3,
        count=ROUTED,
        config={"topk_method": "noaux_tc"},
        dense=(f"{INDEXER}.wk", f"{INDEXER}.weights_proj"),
    ),
    "deepseek_v32": Tiny(
        make=causal("DeepseekV32", SPARSE),
        **V3,
        count=ROUTED,
        config={"topk_method": "noaux_tc"},
        dense=(f"{INDEXER}.wk", f"{INDEXER}.weights_proj"),
    ),
    "glm4_moe_lite": Tiny(
        make=causal("Glm4MoeLite", LATENT | {"mlp_layer_types": ["dense", "sparse"]}),
        **V3,
        count=ROUTED,
    ),
    "qwen3_vl_moe": Tiny(
        make=qwen3_vl_moe,
        experts="model.language_model.layers.0.mlp.experts",
        router="model.language_model.layers.0.mlp.gate",
        count=("num_experts", 4),
        config={"text_config": {"norm_topk_prob": True}},
        turned=(r".*\.experts\.(gate_up|down)_proj",),
    ),
    "nemotron_h": Tiny(
        make=causal(
            "NemotronH",
            MOE
            | {
                "layers_block_type": ["mamba", "attention", "moe", "mlp"],
                "num_hidden_layers": 4,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "moe_shared_expert_intermediate_size": 32,
                "moe_latent_size": 96,
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "n_groups": 2,
                "ssm_state_size": 16,
            },
        ),
        experts="backbone.layers.2.mixer.experts",
        router="backbone.layers.2.mixer.gate",
        count=ROUTED,
        leaves=("up_proj", "down_proj"),
        config={"hybrid_override_pattern": "M*E-", "layers_block_type": None},
        added={"mtp.layers.0.mixer.q_proj.weight": (64, 64)},
        dense=("backbone.layers.2.mixer.fc1_latent_proj", "mtp.layers.0.mixer.q_proj"),
    ),
    "deepseek_v4": Tiny(
        make=causal(
            "DeepseekV4",
            MOE
            | {
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "num_hash_layers": 1,
                "compress_ratios": [4, 4],
                "o_groups": 2,
                "o_lora_rank": 16,
                "q_lora_rank": 32,
                "hc_mult": 2,
                "index_n_heads": 4,
                "index_head_dim": 32,
                "index_topk": 8,
                "qk_rope_head_dim": 8,
                "num_key_value_heads": 1,
            },
        ),
        experts="layers.0.ffn.experts",
        router="layers.0.ffn.gate",
        count=ROUTED,
        leaves=MIXTRAL,
        renames=(
            (r"model\.embed_tokens", "embed"),
            (r"model\.hc_head\.hc_", "hc_head_"),
            (r"model\.", ""),
            (r"(.*\.attn)\.norm\.", r"\1.kv_norm."),
        ),
        dense=("layers.0.attn.compressor.wkv", "layers.0.attn.wo_a"),
    ),
    "minimax_m2": Tiny(
        make=causal(
            "MiniMaxM2",
            BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
        ),
        experts="model.layers.0.block_sparse_moe.experts",
        router="model.layers.0.block_sparse_moe.gate",
        count=("num_local_experts", 4),
        leaves=MIXTRAL,
        config={"rotary_dim": 8, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "minimax_m3_vl_text": Tiny(
        make=lambda: t.MiniMaxM3VLForCausalLM(
            t.MiniMaxM3VLTextConfig(
                **BASE
                | {
                    "num_local_experts": 4,
                    "num_experts_per_tok": 2,
                    "intermediate_size": 32,
                    "dense_intermediate_size": 64,
                    "shared_intermediate_size": 32,
                    "mlp_layer_types": ["dense", "sparse"],
                    "rotary_dim": 8,
                }
            )
        ),
        experts="language_model.model.layers.1.block_sparse_moe.experts",
        router="language_model.model.layers.1.block_sparse_moe.gate",
        count=("num_local_experts", 4),
        leaves=MIXTRAL,
        renames=(
            (r"lm_head", "language_model.lm_head"),
            (r"model\.", "language_model.model."),
            (r"(.*layers\.1)\.mlp\.gate\.e_score", r"\1.block_sparse_moe.e_score"),
            (r"(.*layers\.1)\.mlp\.", r"\1.block_sparse_moe."),
        ),
        config={
            "model_type": "minimax_m3_vl",
            "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "layer_norm_eps": 1e-5,
                "num_attention_heads": 2,
                "num_channels": 3,
                "num_hidden_layers": 1,
                "patch_size": 4,
                "img_token_compression_config": {},
            },
            "text_config": {
                "moe_layer_freq": [0, 1],
                "hidden_act": "swigluoai",
                "sparse_attention_config": {
                    "use_sparse_attention": True,
                    "sparse_index_dim": 16,
                    "sparse_num_index_heads": 2,
                    "sparse_topk_blocks": 16,
                    "sparse_block_size": 128,
                    "sparse_disable_index_value": [0, 1],
                    "sparse_score_type": "max",
                    "sparse_init_block": 0,
                    "sparse_local_block": 1,
                    "sparse_attention_freq": [0, 1],
                },
            },
        },
        nested="minimax_m3_vl_text",
        split=True,
        added={
            f"language_model.model.layers.1.self_attn.index_{n}.weight": shape
            for n, shape in (
                ("q_proj", (32, 64)),
                ("k_proj", (16, 64)),
                ("q_norm", (16,)),
                ("k_norm", (16,)),
            )
        },
    ),
    "kimi_k25": Tiny(
        make=MODELS["deepseek_v3"],
        experts="language_model.model.layers.1.mlp.experts",
        router="language_model.model.layers.1.mlp.gate",
        count=ROUTED,
        renames=((r"", "language_model."),),
        config={
            "model_type": "kimi_k25",
            "architectures": ["KimiK25ForConditionalGeneration"],
            "text_config": {"topk_method": "noaux_tc"},
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "patch_size": 4,
                "pos_emb_height": 2,
                "pos_emb_width": 2,
            },
            "projection_hidden_size": 32,
        },
        nested="kimi_k2",
        added={
            "vision_tower.encoder.blocks.0.wqkv.weight": (96, 32),
            "mm_projector.proj.0.weight": (128, 128),
        },
        dense=("vision_tower.encoder.blocks.0.wqkv", "mm_projector.proj.0"),
    ),
    "kimi_linear": Tiny(
        make=causal(
            "KimiLinear",
            LATENT
            | {
                "q_lora_rank": None,
                "num_local_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
                "mlp_layer_types": ["dense", "sparse"],
            },
        ),
        experts="model.layers.1.block_sparse_moe.experts",
        router="model.layers.1.block_sparse_moe.gate",
        count=("num_experts", 4),
        leaves=MIXTRAL,
        renames=((r"(.*layers\.0)\.block_sparse_moe\.", r"\1.mlp."),),
        config={"num_experts": 4, "num_local_experts": None},
        dense=("model.layers.0.self_attn.f_b_proj", "model.layers.0.self_attn.g_a_proj"),
    ),
    "step3p5": Tiny(
        make=causal("MiniMaxM2", BASE | {"num_local_experts": 4, "intermediate_size": 32}),
        experts="model.layers.1.moe.experts",
        router="model.layers.1.moe.gate",
        count=("moe_num_experts", 4),
        only=r".*(embed_tokens|lm_head|layernorm|model\.norm|[qkvo]_proj).*",
        config={
            "model_type": "step3p5",
            "architectures": ["Step3p5ForCausalLM"],
            "moe_num_experts": 4,
            "moe_layers_enum": "1",
            "moe_top_k": 2,
            "moe_intermediate_size": 32,
            "intermediate_size": 128,
            "share_expert_dim": 32,
            "num_attention_groups": 2,
            "use_head_wise_attn_gate": True,
            "use_moe_router_bias": True,
            "num_local_experts": None,
            "sliding_window": 8,
            "layer_types": ["full_attention", "full_attention"],
        },
        added={
            "model.layers.0.mlp.gate_proj.weight": (128, 64),
            "model.layers.0.mlp.up_proj.weight": (128, 64),
            "model.layers.0.mlp.down_proj.weight": (64, 128),
            "model.layers.1.moe.gate_proj.weight": (4, 32, 64),
            "model.layers.1.moe.up_proj.weight": (4, 32, 64),
            "model.layers.1.moe.down_proj.weight": (4, 64, 32),
            "model.layers.1.moe.gate.weight": (4, 64),
            "model.layers.1.moe.router_bias": (4,),
            "model.layers.1.share_expert.gate_proj.weight": (32, 64),
            "model.layers.1.share_expert.up_proj.weight": (32, 64),
            "model.layers.1.share_expert.down_proj.weight": (64, 32),
            **{f"model.layers.{i}.self_attn.g_proj.weight": (4, 64) for i in range(2)},
            **{
                f"model.layers.{i}.self_attn.{n}_norm.weight": (16,) for i in range(2) for n in "qk"
            },
        },
    ),
    "hunyuan_v1_moe": Tiny(
        make=causal(
            "HunYuanMoEV1",
            BASE
            | {
                "num_experts": 4,
                "moe_topk": 2,
                "num_shared_expert": 1,
                "use_mixed_mlp_moe": True,
                "intermediate_size": 32,
                "moe_intermediate_size": 32,
            },
        ),
        experts="model.layers.0.mlp.experts",
        router="model.layers.0.mlp.gate.wg",
        count=("num_experts", 4),
    ),
    "hy_v3": Tiny(
        make=causal(
            "HYV3",
            MOE
            | {
                "num_experts": 4,
                "num_shared_experts": 1,
                "mlp_layer_types": ["dense", "sparse"],
            },
        ),
        experts="model.layers.1.mlp.experts",
        router="model.layers.1.mlp.router.gate",
        count=("num_experts", 4),
        config={
            "first_k_dense_replace": 1,
            "expert_hidden_dim": 32,
            "route_norm": True,
            "qk_norm": True,
        },
    ),
    "bailing_moe_v2": Tiny(
        make=causal("Olmoe", {k: v for k, v in BASE.items() if k != "head_dim"}),
        experts="model.layers.1.mlp.experts",
        router="model.layers.1.mlp.gate",
        count=("num_experts", 4),
        only=r".*(lm_head|layernorm|model\.norm).*",
        config={
            "model_type": "bailing_moe_v2",
            "architectures": ["BailingMoeV2ForCausalLM"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "moe_router_enable_expert_bias": True,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "score_function": "sigmoid",
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 16,
            "use_qk_norm": True,
            "use_rmsnorm": True,
            "use_bias": False,
            "use_qkv_bias": False,
            "embedding_dropout": 0.0,
        },
        added={
            "model.word_embeddings.weight": (258, 64),
            **{
                f"model.layers.{i}.attention.{n}.weight": shape
                for i in range(2)
                for n, shape in (("query_key_value", (128, 64)), ("dense", (64, 64)))
            },
            **{
                f"model.layers.0.mlp.{n}.weight": shape
                for n, shape in zip(GATED, ((128, 64), (128, 64), (64, 128)), strict=True)
            },
            **{
                f"model.layers.1.mlp.{at}.{n}.weight": shape
                for at in (*(f"experts.{e}" for e in range(4)), "shared_experts")
                for n, shape in zip(GATED, ((32, 64), (32, 64), (64, 32)), strict=True)
            },
            **{
                f"model.layers.{i}.attention.{n}_layernorm.weight": (16,)
                for i in range(2)
                for n in ("query", "key")
            },
            "model.layers.1.mlp.gate.weight": (4, 64),
            "model.layers.1.mlp.gate.expert_bias": (4,),
        },
        unmeasured="no class in transformers",
    ),
    "bailing_hybrid": Tiny(
        make=causal(
            "BailingHybrid",
            LATENT
            | {
                "num_local_experts": 4,
                "layer_group_size": 2,
                "n_group": 1,
                "topk_group": 1,
                "num_mtp_layers": 0,
                "first_k_dense_replace": 1,
                "head_dim": 16,
            },
        ),
        **V3,
        count=("num_experts", 4),
        config={"num_experts": 4, "num_local_experts": None},
    ),
    "ernie4_5_moe": Tiny(
        make=causal(
            "Ernie4_5_Moe",
            BASE
            | {
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": 32,
                "moe_num_shared_experts": 1,
                "moe_layer_start_index": 1,
            },
        ),
        **V3,
        count=("moe_num_experts", 4),
    ),
    "granitemoehybrid": Tiny(
        make=causal(
            "GraniteMoeHybrid",
            BASE
            | {
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "intermediate_size": 32,
                "shared_intermediate_size": 32,
                "layer_types": ["mamba", "attention"],
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_n_groups": 1,
                "mamba_d_state": 16,
            },
        ),
        experts="model.layers.0.block_sparse_moe.experts",
        router="model.layers.0.block_sparse_moe.router.layer",
        count=("num_local_experts", 4),
    ),
    "lfm2_moe": Tiny(
        make=causal(
            "Lfm2Moe",
            MOE
            | {
                "num_experts": 4,
                "num_dense_layers": 1,
                "layer_types": ["conv", "full_attention"],
            },
        ),
        experts="model.layers.1.feed_forward.experts",
        router="model.layers.1.feed_forward.gate",
        count=("num_experts", 4),
        leaves=MIXTRAL,
    ),
    "olmoe": Tiny(
        make=causal(
            "Olmoe",
            {k: v for k, v in BASE.items() if k != "head_dim"}
            | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
        ),
        experts="model.layers.0.mlp.experts",
        router="model.layers.0.mlp.gate",
        count=("num_experts", 4),
    ),
    "mimo_v2_flash": Tiny(
        make=causal(
            "MiMoV2Flash",
            MOE
            | {
                "n_routed_experts": 4,
                "v_head_dim": 16,
                "layer_types": ["full_attention", "sliding_attention"],
                "mlp_layer_types": ["dense", "sparse"],
                "sliding_window": 8,
            },
        ),
        **V3,
        count=ROUTED,
        config={
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 16,
            "hybrid_layer_pattern": [0, 1],
            "layernorm_epsilon": 1e-6,
            "sliding_window_size": 8,
            "add_swa_attention_sink_bias": True,
            "moe_layer_freq": [0, 1],
        },
        added={"model.mtp.layers.0.self_attn.o_proj.weight": (64, 64)},
        dense=("model.mtp.layers.0.self_attn.o_proj",),
    ),
    "longcat_flash": Tiny(
        make=causal(
            "LongcatFlash",
            {k: v for k, v in LATENT.items() if k != "num_hidden_layers"}
            | {
                "num_layers": 2,
                "n_routed_experts": 4,
                "zero_expert_num": 2,
                "expert_ffn_hidden_size": 32,
                "ffn_hidden_size": 64,
                "moe_topk": 2,
                "head_dim": 16,
            },
        ),
        experts="model.layers.0.mlp.experts",
        router="model.layers.0.mlp.router.classifier",
        count=ROUTED,
        only=r"(?!.*experts\.[45]\.).*",  # which compute nothing
        config={
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "zero_expert_type": "identity",
        },
    ),
    "afmoe": Tiny(
        make=causal(
            "Afmoe",
            MOE
            | {
                "num_experts": 4,
                "num_dense_layers": 1,
                "num_shared_experts": 1,
                "sliding_window": 8,
                "global_attn_every_n_layers": 2,
            },
        ),
        experts="model.layers.1.mlp.experts",
        router="model.layers.1.mlp.router.gate",
        count=("num_experts", 4),
        config={
            "score_func": "sigmoid",
            "route_norm": True,
            "route_scale": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "mup_enabled": True,
        },
    ),
    "dots1": Tiny(
        make=causal(
            "Dots1",
            MOE
            | {
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "n_group": 1,
                "topk_group": 1,
            },
        ),
        **V3,
        count=ROUTED,
    ),
}

STEP3P7 = replace(
    FAMILIES["step3p5"],
    config={
        "model_type": "step3p7",
        "architectures": ["Step3p7ForConditionalGeneration"],
        "text_config": {
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_intermediate_size": 32,
            "intermediate_size": 128,
            "share_expert_dim": 32,
            "sliding_window": 8,
            "layer_types": ["full_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    },
    nested="step3p5",
)
"""The same text decoder within Step-3.7, as which transformers has it."""
KIMI_K2 = replace(
    FAMILIES["kimi_k25"],
    experts=V3["experts"],
    router=V3["router"],
    renames=(),
    nested="",
    added={},
    dense=(),
    config={"model_type": "kimi_k2", "topk_method": "noaux_tc"},
)
"""DeepSeek-V3 under a ``model_type`` that transformers does not have."""
PARTIAL = {
    "kimi_k25": ("mm_projector.", "vision_tower."),
    "minimax_m3_vl_text": ("vision_tower.",),
}
"""Towers of which a tiny checkpoint has a tensor or none."""


def save(family: str | Tiny, directory: Path) -> Path:
    """A seeded random bf16 checkpoint of a family, as the hub has it; routers' biases in fp32."""
    t.utils.logging.disable_progress_bar()
    tiny = FAMILIES[family] if isinstance(family, str) else family
    torch.manual_seed(0)
    model = tiny.make().to(torch.bfloat16)
    model.save_pretrained(directory)
    found = _split(load_file(directory / WEIGHTS)) if tiny.split else load_file(directory / WEIGHTS)
    named = {_renamed(n, tiny): w for n, w in found.items() if re.fullmatch(tiny.only, n)}
    for pattern in tiny.turned:
        named |= {n: w.transpose(1, 2) for n, w in named.items() if re.fullmatch(pattern, n)}
    named |= {n: torch.empty(shape, dtype=torch.bfloat16) for n, shape in tiny.added.items()}
    for n in sorted(named):
        if named[n].is_floating_point():
            kept = torch.float32 if re.fullmatch(FP32, n) else torch.bfloat16
            named[n] = torch.empty(named[n].shape, dtype=kept).normal_(std=0.1)
    save_file({n: w.contiguous() for n, w in named.items()}, directory / WEIGHTS, {"format": "pt"})
    _write_config(directory, tiny)
    return directory


def _renamed(name: str, tiny: Tiny) -> str:
    for pattern, by in tiny.renames:
        name = re.sub(rf"^(?:{pattern})", by, name, count=1)
    return name


def _split(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers keeps fused and stacked, as the single linears of Mixtral's names."""
    split: dict[str, torch.Tensor] = {}
    for name, w in found.items():
        at, _, leaf = name.removesuffix(".weight").rpartition(".")
        if w.dim() == 1:
            split[name] = w
            continue
        gate_up = dict(zip(MIXTRAL if w.dim() == 3 else GATED, w.chunk(2, -2), strict=False))
        parts = gate_up if leaf == "gate_up_proj" else {MIXTRAL[2]: w}
        if w.dim() == 3:
            split |= {f"{at}.{e}.{n}.weight": v[e] for n, v in parts.items() for e in range(len(w))}
        elif leaf == "gate_up_proj":
            split |= {f"{at}.{n}.weight": v for n, v in parts.items()}
        else:
            split[name] = w
    return split


def _write_config(directory: Path, tiny: Tiny) -> None:
    path = directory / "config.json"
    found = json.loads(path.read_text())
    if tiny.nested:
        text = {**found, "model_type": tiny.nested}
        found = {"text_config": text}  # which alone states the dtype
    for key, value in tiny.config.items():
        found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
    found = {k: v for k, v in found.items() if v is not None}
    for part in (found, found.get("text_config", {})):  # layers that these checkpoints lack
        part |= {k: 0 for k in ("num_nextn_predict_layers",) if k in part}
    path.write_text(json.dumps(found))


def table() -> str:
    """Return the table of docs/architectures.md: what tests/unit/test_families.py finds."""
    rows = [
        "| `model_type` | models | `--stream` | input scales | Megatron |",
        "|---|---|---|---|---|",
    ]
    for name, tiny in FAMILIES.items():
        known = family_of([name])
        assert known is not None, name
        named = "names alone" if set(known.classes) & UNBUILT.keys() else "-"
        live = "yes" if set(known.classes) & ARCHITECTURES.keys() else named
        measured = f"- ({tiny.unmeasured})" if tiny.unmeasured else "yes"
        rows.append(f"| `{name}` | {known.title} | yes | {measured} | {live} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
