"""Packed weights, whole and in slices, against the decoders of the libraries that made them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.sources import open_source
from megatron_quant.models.spec import Box

Tensors = dict[str, torch.Tensor]
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "packed.safetensors")
MODULE = "model.layers.0.self_attn.o_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
ASYM = {**GPTQ, "sym": False}
V2 = {"checkpoint_format": "gptq_v2"}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
CASES: dict[str, dict[str, Any]] = {
    "gptq_v1_sym4": GPTQ,
    "gptq_v1_sym4_act_order": {**GPTQ, "desc_act": True},
    "gptq_v1_asym4_act_order": {**ASYM, "desc_act": True},
    "gptq_v1_asym4_channel": {**ASYM, "group_size": -1},
    "gptq_v1_asym8": {**ASYM, "dynamic": {"+:.*o_proj": {"bits": 8, "group_size": 32}}},
    "gptq_v2_asym4": {**ASYM, **V2},
    "gptq_v2_sym8_act_order": {**GPTQ, **V2, "bits": 8, "group_size": 32},
    "gptq_v2_asym8_act_order": {**ASYM, **V2, "bits": 8, "group_size": 128},
    "auto_gptq_sym4": {**ROUND, "packing_format": "auto_round:auto_gptq"},
    "auto_gptq_asym4": {**ROUND, "sym": False, "packing_format": "auto_round:auto_gptq"},
    "auto_gptq_sym8": {
        **ROUND,
        "packing_format": "auto_round:auto_gptq",
        "extra_config": {MODULE: {"bits": 8}},
    },
    "auto_awq_fp16": {**ROUND, "sym": False, "packing_format": "auto_round:auto_awq"},
    "awq_fp16": AWQ,
    "awq_bf16": AWQ,
}


def write(directory: Path, quantization: dict[str, Any] | None, tensors: Tensors) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"quantization_config": quantization} if quantization else {}
    (directory / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
    return directory


def golden(case: str) -> Tensors:
    prefix = f"{case}."
    return {k.removeprefix(prefix): t for k, t in GOLDEN.items() if k.startswith(prefix)}


def packed(directory: Path, case: str, **changes: torch.Tensor | None) -> Path:
    """A checkpoint of one module; ``changes`` by suffix, None for a tensor that is left out."""
    stored = {n: t for n, t in golden(case).items() if n != "weight"} | changes
    tensors = {f"{MODULE}.{n}": t for n, t in stored.items() if t is not None}
    return write(directory, CASES[case], tensors)


def read_in_slices(source: Any, name: str, shape: tuple[int, int], tp: int) -> list[torch.Tensor]:
    """The tensor cut into ``tp`` shards of columns and of rows, each put together again."""
    rows, cols = shape
    of_columns = [
        source.read(name, Box((0, r * cols // tp), (rows, cols // tp))) for r in range(tp)
    ]
    of_rows = [source.read(name, Box((r * rows // tp, 0), (rows // tp, cols))) for r in range(tp)]
    return [torch.cat(of_columns, 1), torch.cat(of_rows, 0)]


def check_against(directory: Path, module: str, wanted: torch.Tensor) -> None:
    """Whole, and as shards of tensor parallelism joined: bit for bit in the dtype of ``wanted``."""
    source = open_source(directory)
    name, shape = f"{module}.weight", tuple(wanted.shape)
    found = [source.read(name, Box((0, 0), shape))]
    for tp in (2, 4, 7, 8):
        if not (shape[0] % tp or shape[1] % tp):
            found += read_in_slices(source, name, shape, tp)
    for w_NK in found:
        assert torch.equal(w_NK.to(wanted.dtype), wanted)


@pytest.mark.parametrize("case", CASES)
def test_gptq_auto_round_and_awq(tmp_path: Path, case: str) -> None:
    """Against GPTQModel, AutoRound and AutoAWQ (tests/golden/make_packed.py)."""
    check_against(packed(tmp_path, case), MODULE, golden(case)["weight"].t())


@pytest.mark.parametrize("case", ["gptq_v1_asym4_act_order", "gptq_v2_asym8_act_order"])
def test_any_rectangle_of_permuted_columns(tmp_path: Path, case: str) -> None:
    source, wanted = open_source(packed(tmp_path, case)), golden(case)["weight"].t()
    for row, col, rows, cols in ((0, 0, 1, 1), (3, 5, 7, 11), (9, 61, 23, 100), (31, 223, 1, 1)):
        part = source.read(f"{MODULE}.weight", Box((row, col), (rows, cols)))
        assert torch.equal(part.half(), wanted[row : row + rows, col : col + cols])


def test_group_index_in_natural_order_is_as_good_as_none(tmp_path: Path) -> None:
    with_index = packed(tmp_path / "with", "gptq_v1_sym4")
    without = packed(tmp_path / "without", "gptq_v1_sym4", g_idx=None)
    found = [
        QuantizedCheckpoint(d).weight(f"{MODULE}.weight", torch.float32)
        for d in (with_index, without)
    ]
    assert torch.equal(*found)
