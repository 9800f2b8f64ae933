"""Tiny checkpoints of models without a table, made with transformers' own classes."""

import json
from pathlib import Path

import torch
import transformers as t
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.dist.checkpoints import tokenizer

BASE = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA4 = BASE | {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_k_eq_v": True,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 258,
    "num_kv_shared_layers": 0,
}
QWEN3_5 = BASE | {
    **EXPERTS,
    "num_experts": 4,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
DEEPSEEK = {k: v for k, v in BASE.items() if k != "head_dim"} | {
    **EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "rope_interleave": False,  # which its table refuses
}
LLAMA4 = BASE | {
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
}
GLM4 = BASE | {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def _gemma4() -> t.PreTrainedModel:
    config = t.Gemma4Config(text_config=GEMMA4, vision_config=VISION, audio_config=None)
    return t.Gemma4ForConditionalGeneration(config)


MODELS = {
    "gemma4": _gemma4,
    "gemma4_text": lambda: t.Gemma4ForCausalLM(t.Gemma4TextConfig(**GEMMA4)),
    "qwen3_next": lambda: t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**QWEN3_5)),
    "qwen3_5_moe": lambda: t.Qwen3_5MoeForCausalLM(t.Qwen3_5MoeTextConfig(**QWEN3_5)),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**DEEPSEEK)),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**BASE, num_local_experts=4, num_experts_per_tok=2)
    ),
    "llama4": lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(**LLAMA4)),
    "glm4_moe": lambda: t.Glm4MoeForCausalLM(t.Glm4MoeConfig(**GLM4)),
}


def save(name: str, directory: Path) -> Path:
    """A seeded random bf16 checkpoint with a tokenizer."""
    t.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = MODELS[name]().to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def save_gpt_oss(directory: Path) -> tuple[Path, Path]:
    """(dense, released) below ``directory``: its experts in MXFP4, and as what these stand for."""
    dense, released = save("gpt_oss", directory / "dense"), save("gpt_oss", directory / "released")
    tensors = load_file(dense / "model.safetensors")
    packed, generator = dict(tensors), torch.Generator().manual_seed(3)
    for name in [n for n, stack in tensors.items() if stack.dim() == 3]:
        experts, columns, rows = tensors[name].shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(118, 124, shape, generator=generator).to(torch.uint8)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    save_file(packed, released / "model.safetensors", {"format": "pt"})
    config = json.loads((released / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (released / "config.json").write_text(json.dumps(config))
    return dense, released
