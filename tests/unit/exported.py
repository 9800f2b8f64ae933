"""Exported checkpoints made by hand: one layer of a Qwen3-MoE with two experts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.dialects.base import (
    INPUT_SCALE,
    SHAPE,
    WEIGHT_SCALE,
    ModuleFormat,
    Stored,
    layer_of,
)
from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.formats import amax, encode, get_format, tensor_scale
from megatron_quant.formats.spec import Format
from megatron_quant.models.registry import lookup
from megatron_quant.models.spec import Param
from megatron_quant.recipes.plan import Decision, QuantPlan

Tensors = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
PARAMS = lookup(CONFIG).params(CONFIG)
INDEX = "model.safetensors.index.json"
CHOICES: dict[str, tuple[str, str | None]] = {
    "fp8": ("fp8", "fp8"),
    "fp8 weights": ("fp8", None),
    "fp8_channel": ("fp8_channel", "fp8_channel"),
    "fp8_block": ("fp8_block", "fp8_group"),
    "int8": ("int8", "int8"),
    "int8_static": ("int8", "int8_tensor"),
    "int8_group": ("int8_group", None),
    "int4": ("int4", None),
    "int4_asym": ("int4_asym", None),
    "w4a8": ("int4", "fp8"),
    "w4a8_dynamic": ("int4", "fp8_channel"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "nvfp4 weights": ("nvfp4", None),
    "mxfp8": ("mxfp8", "mxfp8"),
    "mxfp4": ("mxfp4", "mxfp4"),
    "mxfp4 weights": ("mxfp4", None),
}
"""What a checkpoint may be in: formats of its weights and their inputs."""
CELLS = {
    "modelopt": [
        "fp8",
        "fp8_channel",
        "fp8_block",
        "int4",
        "w4a8",
        "nvfp4",
        "nvfp4 weights",
        "mxfp8",
    ],
    "compressed-tensors": list(CHOICES),
    "gptq": ["int4", "int8_group"],
    "awq": ["int4", "int4_asym"],
    "auto-round": ["int4", "int8_group", "int4_asym", "mxfp8", "mxfp4", "mxfp4 weights"],
    "fp8": ["fp8_block"],
}
WRITTEN = [(dialect, choice) for dialect, choices in CELLS.items() for choice in choices]
"""Every dialect with everything that it writes."""
DENSE_ONLY = [
    ("modelopt", "fp8_channel"),
    ("modelopt", "fp8_block"),
    ("compressed-tensors", "int8_static"),
]
"""Of those, what it writes for no experts, or not for a whole model with experts."""
INPUT_AMAX = torch.tensor(3.0)


def formats(choice: str) -> tuple[Format, Format | None]:
    weights, inputs = CHOICES[choice]
    return get_format(weights), get_format(inputs) if inputs else None


def plan(
    choice: str,
    keep: Callable[[str], bool] = lambda module: False,
    params: Sequence[Param] = PARAMS,
) -> QuantPlan:
    """All linears in one format, but those with a source that ``keep`` names."""
    weights, inputs = formats(choice)
    decisions = [
        Decision(slot=slot, rule="test")
        if slot.fixed or any(map(keep, slot.sources))
        else Decision(slot=slot, rule="test", weights=weights, inputs=inputs)
        for slot in slots(params)
    ]
    return QuantPlan("test", tuple(decisions))


def written_plan(dialect: str, choice: str) -> QuantPlan:
    """All that the dialect writes in the format: all linears, or those that are no experts."""
    if (dialect, choice) in DENSE_ONLY:
        return plan(choice, keep=lambda module: "experts" in module)
    return plan(choice)


def read_format(dialect: str, choice: str) -> ModuleFormat:
    """What the dialect's config says of the format when it is read."""
    if (dialect, choice) == ("awq", "int4"):  # whose zero points are all 8
        choice = "int4_asym"
    return ModuleFormat(*formats(choice))


def source_weights(params: Sequence[Param] = PARAMS) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        s.name: (torch.randn(s.shape, generator=generator) * (1 + i)).bfloat16()
        for i, s in enumerate(s for p in params for s in p.sources)
    }


def stored_tensors(
    w_NK: torch.Tensor,
    fmt: Format,
    inputs: Format | None,
    stored: tuple[Stored, ...],
    largest: torch.Tensor | None = None,
) -> Tensors:
    """What a module has on disk, by suffix; ``largest`` is the amax of what it is fused with."""
    largest = amax(w_NK) if largest is None else largest
    dscale = tensor_scale(largest, fmt) if fmt.tensor_scale else None
    values = encode(w_NK, fmt, dscale)
    values[SHAPE] = torch.tensor(w_NK.shape)
    values[WEIGHT_SCALE] = tensor_scale(largest, get_format("fp8"))
    if inputs is not None and inputs.tensor_scale:
        values[INPUT_SCALE] = tensor_scale(INPUT_AMAX, inputs)
    return {s.suffix: s.to_disk(values[s.field]).clone() for s in stored}


def export_tensors(
    dialect: str, quant: QuantPlan, weights: Tensors, params: Sequence[Param] = PARAMS
) -> Tensors:
    out: Tensors = {}
    for param, decision in zip(params, quant.decisions, strict=True):
        group = {s: weights[s.name] for s in param.sources}
        if not decision.quantized:
            out |= {s.name: w for s, w in group.items()}
            continue
        fmt, inputs = decision.weights, decision.inputs
        largest = torch.stack([amax(w) for w in group.values()]).max()
        for source, w in group.items():
            stored = get_dialect(dialect).stored(fmt, inputs, layer_of(source.module))
            made = stored_tensors(w, fmt, inputs, stored, largest)
            out |= {f"{source.module}.{suffix}": t for suffix, t in made.items()}
    return out


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def write(directory: Path, tensors: Tensors, config: dict[str, Any] = CONFIG) -> Path:
    """Two files, an index and config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {n: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        held = {n: tensors[n].contiguous() for n in names if weight_map[n] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    size = sum(t.nbytes for t in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(directory / "config.json", config)
    return directory


def export(
    directory: Path,
    dialect: str,
    quant: QuantPlan,
    weights: Tensors,
    model: dict[str, Any] = CONFIG,
) -> Path:
    chosen = get_dialect(dialect)
    params = lookup(model).params(model)
    config = model | {"quantization_config": chosen.quantization_config(quant)}
    write(directory, export_tensors(dialect, quant, weights, params), config)
    for name, content in chosen.extra_files(quant).items():
        write_json(directory / name, content)
    return directory


def read(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    """``change`` the tensors in place, and write them with an index that fits."""
    tensors = read(directory)
    change(tensors)
    write(directory, tensors, json.loads((directory / "config.json").read_text()))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)
