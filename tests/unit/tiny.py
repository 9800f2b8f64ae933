"""Tiny checkpoints of every known architecture, made by transformers' own classes."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

_SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}
_QWEN3_MOE = (transformers.Qwen3MoeConfig, {**_SIZES, **_EXPERTS, "norm_topk_prob": True})
_QWEN2_MOE = {
    **_SIZES,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LATENT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_DEEPSEEK = {
    **_SIZES,
    "num_key_value_heads": 8,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_nextn_predict_layers": 0,
}
_SIGMOID = {
    **_SIZES,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
_GLM4_MOE = {
    **_SIGMOID,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "attention_bias": True,
    "use_qk_norm": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
_GLM4_MOE_LITE = {
    **{k: v for k, v in _DEEPSEEK.items() if k != "first_k_dense_replace"},
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-6,  # which transformers has in the norms of compressed vectors anyway
    "mlp_layer_types": ["sparse", "dense", "sparse"],
}
_DOTS1 = {**_SIGMOID, "n_routed_experts": 8, "n_shared_experts": 2, "head_dim": 16}
_HY_V3 = {**_SIGMOID, "num_experts": 8, "num_shared_experts": 1, "head_dim": 16}
_DELTA = {
    **_SIZES,
    **_EXPERTS,
    "head_dim": 16,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "layer_types": ["linear_attention", "full_attention"],
}
_QWEN3_5_VL = {
    "text_config": _DELTA,
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
    },
    "tie_word_embeddings": False,
}
_KIMI_K25 = {
    "text_config": {**_DEEPSEEK, "model_type": "deepseek_v3", "rope_parameters": _LATENT_YARN},
    "vision_config": {
        "patch_size": 2,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
        "pos_emb_time": 2,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
    },
    "projection_hidden_size": 16,
    "tie_word_embeddings": False,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GPT_OSS = (
    transformers.GptOssConfig,
    {
        **_SIZES,
        "intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 6,
        "swiglu_limit": 1.0,  # some activations are beyond it
        "rope_parameters": {**_YARN, "truncate": False},
    },
)

MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_moe_raw": (_QWEN3_MOE[0], {**_QWEN3_MOE[1], "norm_topk_prob": False}),
    "qwen3_moe_mixed": (_QWEN3_MOE[0], {**_QWEN3_MOE[1], "mlp_only_layers": [0]}),
    "qwen2_moe": (transformers.Qwen2MoeConfig, _QWEN2_MOE),
    "mixtral": (transformers.MixtralConfig, {**_SIZES, "num_local_experts": 4}),
    "gpt_oss": _GPT_OSS,
    "qwen3": (transformers.Qwen3Config, {**_SIZES, "head_dim": 16}),
    "qwen3_tied": (transformers.Qwen3Config, {**_SIZES, "tie_word_embeddings": True}),
    "deepseek_v3": (transformers.DeepseekV3Config, {**_DEEPSEEK, "rope_parameters": _LATENT_YARN}),
    "deepseek_v3_plain": (
        transformers.DeepseekV3Config,
        {**_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "glm4_moe": (transformers.Glm4MoeConfig, _GLM4_MOE),
    "glm4_moe_lite": (transformers.Glm4MoeLiteConfig, _GLM4_MOE_LITE),
    "qwen3_next": (transformers.Qwen3NextConfig, _DELTA),
    "qwen3_5_moe": (transformers.Qwen3_5MoeTextConfig, _DELTA),
    "qwen3_5_moe_vl": (transformers.Qwen3_5MoeConfig, _QWEN3_5_VL),
    "kimi_k25": (transformers.Kimi_K25Config, _KIMI_K25),
    "dots1": (transformers.Dots1Config, _DOTS1),
    "hy_v3": (transformers.HYV3Config, _HY_V3),
    "llama": (transformers.LlamaConfig, _SIZES),
    "llama3": (transformers.LlamaConfig, {**_SIZES, "rope_parameters": _LLAMA3}),
    "llama_linear": (transformers.LlamaConfig, {**_SIZES, "rope_parameters": _LINEAR}),
    "llama_yarn": (transformers.LlamaConfig, {**_SIZES, "rope_parameters": _YARN}),
}


# What transformers calls otherwise than the hub does: the class, and names of tensors.
_CLASSES = {
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen3_5_moe_vl": "Qwen3_5MoeForConditionalGeneration",
}
_NAMES = {"kimi_k25": (r"model\.blocks\.", "model.layers.")}


def model(name: str) -> transformers.PreTrainedModel:
    """The transformers model in fp32, with seeded random weights, norms and biases too."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    nested = "text_config" in settings
    auto = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    built = auto.from_config(kind(**settings)).float().eval()
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in key or "A_log" in key:
                parameter.normal_(std=0.3)
        for key, buffer in built.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    return built


def save(name: str, directory: Path, **settings: Any) -> Path:
    """``model(name)`` as save_pretrained writes it (``settings`` are its arguments)."""
    transformers.utils.logging.disable_progress_bar()
    model(name).save_pretrained(directory, **settings)
    if name in _NAMES:
        _as_published(name, directory)
    return directory


def _as_published(name: str, directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [_CLASSES[name]]}))
    weights = directory / "model.safetensors"
    found = {re.sub(*_NAMES[name], n): w for n, w in load_file(weights).items()}
    save_file(found, weights, metadata={"format": "pt"})


def config(name: str) -> dict[str, Any]:
    """config.json of ``name``, without its weights."""
    kind, settings = MODELS[name]
    made = kind(**settings)
    made.architectures = [_CLASSES.get(name, kind.__name__.replace("Config", "ForCausalLM"))]
    return json.loads(made.to_json_string())
