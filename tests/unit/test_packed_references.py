"""Packed weights against the decoders of compressed-tensors, ModelOpt and transformers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_quant.ckpt.dialects.registry import get_dialect
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.errors import CheckpointError
from megatron_quant.formats.spec import CHANNEL, Format, get_format, stored_format
from megatron_quant.models.spec import Box
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot
from tests import host
from tests.unit import exported
from tests.unit.test_packed_sources import MODULE, check_against, write

ROWS, COLS = 64, 192
GEN = torch.Generator().manual_seed(13)
PACKED = [
    (name, group, dtype)
    for name in ("int4", "int4_asym", "int8_group", "int8_asym")
    for group, dtype in ((32, torch.bfloat16), (64, torch.float16), (CHANNEL, torch.bfloat16))
]
FLOAT = ["fp8", "fp8_channel", "fp8_block", "nvfp4", "mxfp4", "mxfp8", "int8"]
INPUTS = {"int8": "int8", "fp8": "fp8", "nvfp4": "nvfp4"}


def a_weight(rows: int = ROWS, cols: int = COLS) -> torch.Tensor:
    return torch.randn(rows, cols, generator=GEN).bfloat16()


def one_module(fmt: Format, inputs: Format | None) -> QuantPlan:
    slot = Slot(name=f"{MODULE}.weight", sources=(MODULE,), shape=(ROWS, COLS))
    return QuantPlan("test", (Decision(slot=slot, rule="test", weights=fmt, inputs=inputs),))


def stored(dialect: str, fmt: Format, inputs: Format | None, w_NK: torch.Tensor) -> Any:
    """Quantization config, and the module's tensors by suffix."""
    made = get_dialect(dialect)
    config = made.quantization_config(one_module(fmt, inputs))
    return config, exported.stored_tensors(w_NK, fmt, inputs, made.stored(fmt, inputs))


def on_disk(directory: Path, config: dict[str, Any], tensors: exported.Tensors) -> Path:
    return write(directory, config, {f"{MODULE}.{n}": t for n, t in tensors.items()})


def decompressed(config: dict[str, Any], tensors: exported.Tensors) -> torch.Tensor:
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    codec: Any = BaseCompressor.get_value_from_registry(config["format"])
    return codec.decompress(dict(tensors), parsed.config_groups["group_0"])["weight"]


@pytest.mark.parametrize(("name", "group", "dtype"), PACKED)
def test_pack_quantized(tmp_path: Path, name: str, group: int, dtype: torch.dtype) -> None:
    fmt = stored_format(name, group)
    config, tensors = stored("compressed-tensors", fmt, None, a_weight())
    tensors["weight_scale"] = tensors["weight_scale"].to(dtype) * 1.01
    wanted = decompressed(config, tensors)
    assert wanted.dtype == dtype
    check_against(on_disk(tmp_path, config, tensors), MODULE, wanted)


@pytest.mark.parametrize("name", FLOAT)
def test_compressed_tensors(tmp_path: Path, name: str) -> None:
    inputs = get_format(INPUTS[name]) if name in INPUTS else None
    config, tensors = stored("compressed-tensors", get_format(name), inputs, a_weight(192, 224))
    wanted = decompressed(config, tensors)
    check_against(on_disk(tmp_path, config, tensors), MODULE, wanted.bfloat16())


def test_activation_order_of_pack_quantized(tmp_path: Path) -> None:
    """A column belongs to the group that ``weight_g_idx`` says: as if columns were sorted by it."""
    config, tensors = stored("compressed-tensors", get_format("int4_asym", 32), None, a_weight())
    order = torch.randperm(COLS, generator=GEN)
    codes = unpack_from_int32(tensors["weight_packed"], 4, torch.Size((ROWS, COLS)))
    permuted = codes[:, order].contiguous()
    wanted = decompressed(config, tensors)[:, order]
    tensors |= {
        "weight_packed": pack_to_int32(permuted, 4),
        "weight_g_idx": (order // 32).to(torch.int32),
    }
    check_against(on_disk(tmp_path, config, tensors), MODULE, wanted)


def test_modelopt_fp8(tmp_path: Path) -> None:
    host.ready()
    from modelopt.torch.quantization.qtensor import FP8QTensor

    fmt = get_format("fp8")
    config, tensors = stored("modelopt", fmt, fmt, a_weight())
    theirs = FP8QTensor(torch.Size((ROWS, COLS)), torch.bfloat16, tensors["weight"])
    wanted = theirs.dequantize(torch.float32, scale=tensors["weight_scale"])
    check_against(on_disk(tmp_path, config, tensors), MODULE, wanted)


@pytest.mark.parametrize("only_beside_the_config", [False, True])
def test_modelopt_nvfp4(tmp_path: Path, only_beside_the_config: bool) -> None:
    """Older exports have hf_quant_config.json and no quantization_config."""
    host.ready()
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    fmt = get_format("nvfp4")
    config, tensors = stored("modelopt", fmt, fmt, a_weight())
    theirs = NVFP4QTensor(torch.Size((ROWS, COLS)), torch.bfloat16, tensors["weight"])
    wanted = theirs.dequantize(
        torch.float32,
        scale=tensors["weight_scale"],
        double_scale=tensors["weight_scale_2"],
        block_sizes={-1: 16},
    )
    on_disk(tmp_path, {} if only_beside_the_config else config, tensors)
    if only_beside_the_config:
        files = get_dialect("modelopt").extra_files(one_module(fmt, fmt))
        for name, document in files.items():
            (tmp_path / name).write_text(json.dumps(document))
    check_against(tmp_path, MODULE, wanted)


def test_native_block_fp8(tmp_path: Path) -> None:
    fmt, inputs = get_format("fp8_block"), get_format("fp8_group")
    config, tensors = stored("fp8", fmt, inputs, a_weight(256, 384))
    quantizer: Any = SimpleNamespace()
    wanted = Fp8Dequantize(quantizer)._dequantize_one(
        tensors["weight"], tensors["weight_scale_inv"], torch.float32
    )
    check_against(on_disk(tmp_path, config, tensors), MODULE, wanted)


# Stacks of experts, as GPT-OSS has them

EXPERTS, INNER, HIDDEN = 3, 96, 128
STACK = "model.layers.0.mlp.experts"


def stacks() -> exported.Tensors:
    tensors = {}
    for name, rows, cols in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        shape = (EXPERTS, rows, cols // 32)
        drawn = torch.randint(0, 256, (*shape, 16), generator=GEN)
        tensors[f"{STACK}.{name}_blocks"] = drawn.to(torch.uint8)
        drawn = torch.randint(110, 130, shape, generator=GEN)
        tensors[f"{STACK}.{name}_scales"] = drawn.to(torch.uint8)
        tensors[f"{STACK}.{name}_bias"] = torch.randn(shape[:2], generator=GEN).bfloat16()
    return tensors | {"model.norm.weight": torch.ones(HIDDEN)}


def as_stacks(directory: Path, tensors: exported.Tensors) -> Path:
    return write(directory, {"quant_method": "mxfp4"}, tensors)


def test_gpt_oss(tmp_path: Path) -> None:
    tensors = stacks()
    source = open_source(as_stacks(tmp_path, tensors))
    assert len(list(source)) == 3 * EXPERTS * 2 + 1
    whole = {
        name: convert_moe_packed_tensors(
            tensors[f"{STACK}.{name}_blocks"],
            tensors[f"{STACK}.{name}_scales"],
            dtype=torch.float32,
        ).transpose(1, 2)  # theirs is [E, K, N]
        for name in ("gate_up_proj", "down_proj")
    }
    biases = {name: tensors[f"{STACK}.{name}_bias"] for name in whole}
    for e in range(EXPERTS):
        for projection, values in (
            ("gate_proj", (whole["gate_up_proj"][e, 0::2], biases["gate_up_proj"][e, 0::2])),
            ("up_proj", (whole["gate_up_proj"][e, 1::2], biases["gate_up_proj"][e, 1::2])),
            ("down_proj", (whole["down_proj"][e], biases["down_proj"][e])),
        ):
            name, (wanted, bias) = f"{STACK}.{e}.{projection}", values
            assert source.info(f"{name}.weight").shape == tuple(wanted.shape)
            check_against(tmp_path, name, wanted)
            part = source.read(f"{name}.weight", Box((5, 40), (7, 30)))
            assert torch.equal(part, wanted[5:12, 40:70])
            assert torch.equal(source.read(f"{name}.bias", Box((3,), (60,))), bias[3:63])
    assert source.read("model.norm.weight", Box((0,), (4,))).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (
            "scales",
            lambda t: t[..., :-1],
            r"down_proj_scales is .*, but .* needs torch.uint8 \[3, 128, 3\]",
        ),
        ("scales", lambda t: None, "down_proj_scales is missing"),
        ("blocks", lambda t: t.flatten(2), r"down_proj_blocks is .*, not uint8 \[experts, rows"),
        ("bias", lambda t: t[:, :-1], r"down_proj_bias is torch.bfloat16 \[3, 127\], but"),
    ],
)
def test_bad_stacks(tmp_path: Path, suffix: str, change: Any, message: str) -> None:
    tensors, name = stacks(), f"{STACK}.down_proj_{suffix}"
    changed = {n: change(t) if n == name else t for n, t in tensors.items()}
    directory = as_stacks(tmp_path, {n: t for n, t in changed.items() if t is not None})
    with pytest.raises(CheckpointError, match=message):
        open_source(directory)
