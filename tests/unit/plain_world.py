"""Training checkpoints that torch alone writes, with the keys that Megatron's own savers give."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_quant.ckpt.read import fill, open_source
from megatron_quant.models import copies, lookup

Tensors = Mapping[str, torch.Tensor]
_EXPERT = re.compile(r"(.+\.experts)\.(linear_fc\d)\.weight(\d+)")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a Hugging Face folder's model, whole, by its name in Megatron."""
    weights = open_source(folder)
    found = {}
    for param in lookup(weights.config).params(weights.config):
        tensor = torch.empty(param.shape)
        fill(tensor, copies(param, 0, 1), weights)
        tensor += param.shift
        if param.inside and param.live in found:  # it comes last
            tensor = torch.cat([found[param.live], tensor])
        found[param.live] = tensor
    return found


def delta_nets_apart(folder: Path) -> dict[str, torch.Tensor]:
    """``tensors_of``, with the parts of delta nets' linears as Megatron saves them."""
    found = tensors_of(folder)
    config = open_source(folder).config
    for param in lookup(config).params(config):
        if not param.kept:
            continue
        at = param.inside.before if param.inside else 0
        for name, item in zip(param.kept, param.order, strict=True):
            rows = item.count * param.groups
            found[f"{param.live}.{name}"] = found[param.live][at : at + rows].clone()
            at += rows
    return {k: t for k, t in found.items() if not re.search(r"\.(in_proj|conv1d)\.weight$", k)}


def apart(tensors: Tensors) -> dict[str, torch.Tensor]:
    """One key an expert, and one for gate and one for up."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        key = f"{match[1]}.experts.{match[3]}.{match[2]}.weight" if match else name
        found |= halves(key, tensor)
    return found


def of_fsdp(tensors: Tensors, prefix: str = "model.module.") -> dict[str, torch.Tensor]:
    """Names of the model's own state dict, as Megatron-FSDP saves it."""
    plain = {}
    for name, tensor in tensors.items():
        plain |= halves(name, tensor)
    return {prefix + name: tensor for name, tensor in plain.items()}


def halves(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if ".linear_fc1." not in key or "layer_norm" in key:
        return {key: tensor}
    gate, up = tensor.chunk(2)
    return {f"{key}_w": gate.clone(), f"{key}_v": up.clone()}


def stacked(tensors: Tensors, layers: int, experts: int) -> dict[str, torch.Tensor]:
    """One key for all layers and experts, which are leading dims."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        key = f"{match[1]}.experts.{match[2]}.weight" if match else name
        found.setdefault(re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", key), []).append(
            tensor
        )
    return {
        key: torch.stack(of_key).view(
            *([layers] if key.startswith("decoder.layers.") else []),
            *([experts] if ".experts.experts." in key else []),
            *of_key[0].shape,
        )
        for key, of_key in found.items()
    }


def write(folder: Path, tensors: Tensors, metadata: bool = True) -> Path:
    """Write a checkpoint of one rank; without ``metadata`` as torch's own users do."""
    save(dict(tensors), storage_writer=FileSystemWriter(folder), no_dist=True)
    if metadata:
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder
