"""transformers: NVFP4 experts of a compressed-tensors checkpoint are read wrongly, in silence.

A dense model with the same scheme is read right, which rules the file out.

    python docs/upstream/transformers_nvfp4_experts.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import tiny_moe as tiny

# isort: split
import torch
import transformers

from megatron_quant.evaluation import decoded

transformers.utils.logging.set_verbosity_error()
SIZES = {
    "vocab_size": 258,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
IDS = torch.arange(32) * 7 % 250


def error(config: transformers.PretrainedConfig) -> str:
    """How far transformers' logits are from those of the decoded weights, relative."""
    work = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(work / "source")
    paths = ("--hf-model-id", work / "source", "--export-dir", work / "out")
    recipe = ("--export-quant-cfg", "w4a16_nvfp4", "--export-format", "compressed-tensors")
    command = [sys.executable, "-m", "megatron_quant", "quantize", *paths, *recipe]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    want = decoded(work / "out", torch.bfloat16)(IDS).float()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(work / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        found = loaded(IDS[None]).logits[0].float()
    return f"{float((found - want).norm() / want.norm()):.3f}"


errors = {
    "dense": error(transformers.Qwen3Config(**SIZES)),
    "experts": error(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)),
}
tiny.finish(
    "logits of the decoded weights (to bf16 rounding), or an error",
    f"loaded; relative error of the logits: {errors}",
    float(errors["dense"]) < 0.05 < float(errors["experts"]),
)
