"""A GPTQ checkpoint of a small Qwen3-MoE, packed here by hand, and the same weights decoded."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.dist import checkpoints

# Eight rows of a router fill a word of zero points. Inner sizes that end inside groups of 128, on one rank and on four.
SIZES = {"moe_intermediate_size": 704, "num_hidden_layers": 1, "num_experts": 8}
WEIGHTS = "model.safetensors"
ROUTER = "model.layers.0.mlp.gate"
DOWN = "model.layers.0.mlp.experts.1.down_proj"
GROUP = 128
Tensors = dict[str, torch.Tensor]
QUANTIZATION = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "sym": True,
    "desc_act": True,
    "checkpoint_format": "gptq",
    "dynamic": {"+:.*up_proj": {"bits": 8}, "+:.*q_proj": {"sym": False}},
}


def save(directory: Path, act_order: bool = True) -> tuple[Path, Path]:
    """(packed, decoded) below ``directory``; the decoded one is fp32.

    Every matrix but embedding and output layer is packed, the router too: 8 bits for up_proj,
    zero points for q_proj, and with ``act_order`` permuted columns for down_proj.
    """
    decoded = checkpoints.save("qwen3_moe", directory / "decoded", **SIZES)
    plain = load_file(decoded / WEIGHTS)
    stored: Tensors = {}
    generator = torch.Generator().manual_seed(5)
    for name, w in list(plain.items()):
        module = name.removesuffix(".weight")
        if w.dim() != 2 or "embed" in name or "lm_head" in name:
            stored[name] = w
            plain[name] = w.float()
            continue
        bits = 8 if "up_proj" in name else 4
        permuted = generator if act_order and "down_proj" in name else None
        tensors, plain[name] = packed(w.float(), bits, "q_proj" in name, permuted)
        stored |= {f"{module}.{suffix}": t.contiguous() for suffix, t in tensors.items()}
    save_file(plain, decoded / WEIGHTS, {"format": "pt"})
    other = directory / "packed"
    other.mkdir()
    for file in decoded.iterdir():
        if file.name not in (WEIGHTS, "config.json"):
            (other / file.name).write_bytes(file.read_bytes())
    save_file(stored, other / WEIGHTS, {"format": "pt"})
    config = json.loads((decoded / "config.json").read_text())
    (decoded / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return other, decoded


def packed(
    w_NK: torch.Tensor, bits: int, zeros: bool, permuted: torch.Generator | None
) -> tuple[Tensors, torch.Tensor]:
    """What GPTQ version 1 stores of a rounded weight, and that weight in fp32."""
    rows, cols = w_NK.shape
    index = torch.arange(cols) // GROUP
    if permuted is not None:
        index = index[torch.randperm(cols, generator=permuted)]
    groups, top = int(index.max()) + 1, 2**bits - 1
    scale = torch.empty(rows, groups)
    zero = torch.full((rows, groups), 2 ** (bits - 1))
    for g in range(groups):
        own = w_NK[:, index == g]
        low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
        if zeros:
            scale[:, g] = (high - low) / top
            zero[:, g] = (-low / scale[:, g]).round().clamp(1, top)  # version 1 stores no 0
        else:
            scale[:, g] = torch.maximum(high, -low) / (top / 2)
    scale = scale.half().float()
    codes = (w_NK / scale[:, index] + zero[:, index]).round().clamp(0, top).long()
    tensors = {
        "qweight": _words(codes.t(), bits),
        "qzeros": _words((zero - 1), bits).t(),
        "scales": scale.t().half(),
        "g_idx": index.to(torch.int32),
    }
    return tensors, (codes - zero[:, index]) * scale[:, index]


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [A, B], packed along A from the lowest bits up: int32 [A * bits / 32, B]."""
    each = 32 // bits
    shifts = torch.arange(each)[None, :, None] * bits
    words = (codes.long().unflatten(0, (-1, each)) << shifts).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
