"""A Qwen3-MoE checkpoint of a given size with random weights, made from its table alone."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_quant.models import lookup

_SHARD = 500_000_000
_EXPERTS, _HIDDEN, _FFN, _VOCAB = 16, 2048, 1024, 16384
_CONFIG: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": _HIDDEN,
    "intermediate_size": 4 * _FFN,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def make_checkpoint(directory: Path, gigabytes: float, experts: int = 1) -> Path:
    """Make about ``gigabytes``, in shards of half a GB, with ``experts`` times as many experts.

    Each expert is then as many times smaller.
    """
    layer = (_EXPERTS * 3 * _FFN + 40 * 128) * _HIDDEN * 2
    layers = max(round((gigabytes * 1e9 - 4 * _VOCAB * _HIDDEN) / layer), 1)
    return _write(directory, layers, _EXPERTS * experts, _FFN // experts, _VOCAB)


def make_smallest(directory: Path) -> Path:
    """Make one layer of the same shapes with as few experts as possible, for first calls."""
    return _write(directory, 1, 4, _FFN, 512)


def make_layers(directory: Path, layers: int, experts: int) -> Path:
    """So many layers of ``experts`` experts of 512 features, with a small vocabulary."""
    return _write(directory, layers, experts, 512, 4096)


def _write(directory: Path, layers: int, experts: int, ffn: int, vocab: int) -> Path:
    sizes = {"num_hidden_layers": layers, "num_experts": experts, "vocab_size": vocab}
    config = {**_CONFIG, **sizes, "moe_intermediate_size": ffn}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    where: dict[str, str] = {}
    for number, held in enumerate(_shards(config)):
        file = f"model-{number:05d}.safetensors"
        save_file(held, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, file))
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _shards(config: dict[str, object]) -> Iterator[dict[str, torch.Tensor]]:
    noise = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.05
    held: dict[str, torch.Tensor] = {}
    for source in (s for param in lookup(config).params(config) for s in param.sources):
        held[source.name] = noise[: math.prod(source.shape)].view(source.shape).clone()
        if sum(t.nbytes for t in held.values()) > _SHARD:
            yield held
            held = {}
    yield held


def gigabytes_of(directory: Path) -> float:
    """Return the size of the weights."""
    return sum(p.stat().st_size for p in directory.glob("*.safetensors")) / 1e9
