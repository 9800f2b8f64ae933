"""``eval`` of what ``--stream`` makes of models with towers, of transformers' own classes."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as t
from torch.nn.functional import cosine_similarity

from megatron_quant.evaluation import Text, decoded, evaluate
from tests.dist.checkpoints import tokenizer
from tests.unit import hf_models, sources

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TEXT = hf_models.BASE | {"rope_parameters": MROPE}
EXPERTS = {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []} | hf_models.EXPERTS
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
}
QWEN3_VISION = QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
PIXTRAL = {"model_type": "pixtral", "image_size": 16, "patch_size": 4} | hf_models.VISION
GLM_TEXT = hf_models.GLM4 | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}
GLM_VISION = QWEN_VISION | {"image_size": 16}
INTERN = {"image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"}
LLAMA_VISION = hf_models.VISION | {
    "image_size": 16,
    "patch_size": 4,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}

MODELS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "gemma4": hf_models.MODELS["gemma4"],
    "qwen2_5_vl": lambda: t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(text_config=TEXT, vision_config=QWEN_VISION)
    ),
    "qwen3_vl": lambda: t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(text_config=TEXT, vision_config=QWEN3_VISION)
    ),
    "qwen3_vl_moe": lambda: t.Qwen3VLMoeForConditionalGeneration(
        t.Qwen3VLMoeConfig(text_config=TEXT | EXPERTS, vision_config=QWEN3_VISION)
    ),
    "qwen3_5_moe": lambda: t.Qwen3_5MoeForConditionalGeneration(
        t.Qwen3_5MoeConfig(
            text_config=hf_models.QWEN3_5 | {"rope_parameters": MROPE}, vision_config=QWEN3_VISION
        )
    ),
    "mistral3": lambda: t.Mistral3ForConditionalGeneration(
        t.Mistral3Config(
            text_config=hf_models.BASE | {"model_type": "mistral"},
            vision_config=PIXTRAL,
            spatial_merge_size=1,
        )
    ),
    "internvl": lambda: t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            text_config=hf_models.BASE | {"model_type": "qwen3"},
            vision_config=hf_models.VISION | INTERN,
        )
    ),
    "glm4v_moe": lambda: t.Glm4vMoeForConditionalGeneration(
        t.Glm4vMoeConfig(text_config=GLM_TEXT, vision_config=GLM_VISION)
    ),
    "llama4": lambda: t.Llama4ForConditionalGeneration(
        t.Llama4Config(text_config=hf_models.LLAMA4, vision_config=LLAMA_VISION)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_number_and_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(source)
    tokenizer().save_pretrained(source)
    ids = torch.arange(20, 52)
    with torch.inference_mode():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    found = decoded(source, torch.bfloat16)(ids)
    assert cosine_similarity(found.float(), logits.float(), dim=-1).min() > 0.995
    sources.run(source, out)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    result = evaluate(out, Text(text, 32, 64), source)
    assert math.isfinite(result.perplexity) and result.tokens == 64
    assert result.kl is not None and 0 < result.kl < 0.5
