"""Checkpoints with layers for speculation, by the names of the hub, and what these compute."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_quant.models import lookup



def add(directory: Path, key: str | None = "num_nextn_predict_layers", copies: bool = True) -> Path:
    """Give the checkpoint one such layer, with random weights; ``key`` says so in config.json.

    copies: whether it stores the embedding and the output layer again, as DeepSeek's does.
    """
    file = directory / "config.json"
    config = json.loads(file.read_text())
    if key is not None:
        config.get("text_config", config)[key] = 1
        file.write_text(json.dumps(config))
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    architecture, generator = lookup(config), torch.Generator().manual_seed(7)
    dtype = tensors[next(n for n in tensors if n.endswith("o_proj.weight"))].dtype
    for param in architecture.drafts(config, 1):
        for source in param.sources:
            value = torch.randn(source.shape, generator=generator) * 0.15
            if "norm" in source.name:
                value = 1 + value
            kind = torch.float32 if param.fp32 else dtype
            tensors[source.name] = value.to(kind)
    if copies:
        for param in architecture.with_drafts(config, 1):
            if param.copy_of:
                own = "lm_head" if "output" in param.copy_of else "embed_tokens"
                (same,) = (n for n in tensors if n.endswith(f"{own}.weight") and "layers." not in n)
                tensors[param.sources[0].name] = tensors[same].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    return directory
