"""Small checkpoints with a tokenizer, in sizes that every format takes at tp 4, ep 4 and etp 2."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SIZES = {
    "vocab_size": 258,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "eos_token_id": 257,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
_DEEPSEEK = {
    **{k: v for k, v in _SIZES.items() if k != "head_dim"},
    **_LATENT,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}
_DELTA = {
    **_SIZES,
    **_EXPERTS,
    "shared_expert_intermediate_size": 256,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
_SIGMOID = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
# Config classes by name: older releases of transformers lack some.
_CONFIGS = {
    "qwen3_moe": ("Qwen3MoeConfig", {**_SIZES, **_EXPERTS}),
    "mixtral": (
        "MixtralConfig",
        {**_SIZES, "num_local_experts": 4, "intermediate_size": 256},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_SIZES,
            "intermediate_size": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_SIZES, **_EXPERTS, "shared_expert_intermediate_size": 256},
    ),
    "qwen3": ("Qwen3Config", _SIZES),
    "llama": ("LlamaConfig", _SIZES),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "qwen3_next": ("Qwen3NextConfig", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", _DELTA),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**_SIZES, **_SIGMOID, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {
            **{k: v for k, v in _SIZES.items() if k != "head_dim"},
            **_LATENT,
            **_SIGMOID,
            "num_nextn_predict_layers": 0,
        },
    ),
    "dots1": ("Dots1Config", {**_SIZES, **_SIGMOID, "norm_topk_prob": True}),
    "hy_v3": (
        "HYV3Config",
        {**_SIZES, **{k: v for k, v in _SIGMOID.items() if k[:2] != "n_"}, "num_experts": 8},
    ),
}


def save(name: str, directory: Path, **changes: object) -> Path:
    """A seeded random bf16 checkpoint of architecture ``name``; ``changes`` are config values."""
    transformers.utils.logging.disable_progress_bar()
    kind, settings = _CONFIGS[name]
    config = getattr(transformers, kind)(**{**settings, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        if "bias" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16)
    for key, parameter in model.named_parameters():
        if key.endswith("A_log"):
            parameter.data = torch.linspace(-1, 1, len(parameter))  # in fp32, as in checkpoints
        if key.endswith("linear_attn.norm.weight"):
            parameter.data.copy_(torch.linspace(0.1, 2, len(parameter)))
    for key, buffer in model.named_buffers():  # transformers leaves them zero
        if key.endswith("e_score_correction_bias"):
            buffer.data = torch.linspace(-0.1, 0.1, len(buffer))  # in fp32, as in checkpoints
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<unk>", "<eos>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", unk_token="<unk>"
    )
