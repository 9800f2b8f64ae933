"""Checkpoints as people publish them, made by changing one that transformers saved."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_quant.cli.console import ConsolePhases, console
from megatron_quant.dist import Groups
from megatron_quant.runs.file_to_file import Streamed
from megatron_quant.runs.file_to_file import stream_files as stream
from megatron_quant.runs.options import QuantizeOptions

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def run(source: Path, out: Path, **changes: object) -> Streamed:
    """``source`` streamed into ``out``: weights alone, in the recipe fp8_channel unless said."""
    options = {
        "export_quant_cfg": "fp8_channel",
        "export_format": "compressed-tensors",
        "weight_only": True,
        **changes,
    }
    named = QuantizeOptions.from_flags(
        hf_model_id=str(source), export_dir=out, stream=True, **options
    )
    return stream(named, Groups(), ConsolePhases(console()))


def tensors(directory: Path) -> Tensors:
    """Of all safetensors files."""
    return {n: t for f in sorted(directory.glob("*.safetensors")) for n, t in load_file(f).items()}


def write(directory: Path, found: Tensors, file: str = WEIGHTS) -> None:
    save_file({n: t.contiguous() for n, t in found.items()}, directory / file, {"format": "pt"})


def edit(directory: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """``change`` the tensors of a checkpoint of one file, in place or into what it returns."""
    found = tensors(directory)
    write(directory, change(found) or found)


def config(directory: Path, **keys: object) -> dict:
    """config.json, with ``keys`` changed."""
    path = directory / "config.json"
    found = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps(found))
    return found


def index(directory: Path, files: Mapping[str, Iterable[str]]) -> None:
    """An index that names these tensors by file."""
    where = {name: file for file, names in files.items() for name in names}
    content = {"metadata": {}, "weight_map": where}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
