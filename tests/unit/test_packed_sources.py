"""Packed weights, whole and in slices, against the decoders of the libraries that made them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_quant.ckpt.convert import plan_of
from megatron_quant.ckpt.read.checks import check_weights
from megatron_quant.ckpt.read.open import open_source
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.read.scale_keeping import keeping
from megatron_quant.errors import CheckpointError, FormatError
from megatron_quant.formats.spec import get_format
from megatron_quant.models.spec import Box, Parallel, Param, Role, Source
from megatron_quant.recipes.plan import Decision, QuantPlan, Slot

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
    save_file(
        {n: t.clone().contiguous() for n, t in tensors.items()}, directory / "model.safetensors"
    )
    return directory


def golden(case: str) -> Tensors:
    prefix = f"{case}."
    return {k.removeprefix(prefix): t for k, t in GOLDEN.items() if k.startswith(prefix)}


def packed(directory: Path, case: str, **changes: torch.Tensor | None) -> Path:
    """A checkpoint of one module; ``changes`` by suffix, None for a tensor that is left out."""
    stored = {n: t for n, t in golden(case).items() if n != "weight"} | changes
    tensors = {f"{MODULE}.{n}": t for n, t in stored.items() if t is not None}
    return write(directory, CASES[case], tensors)


def joined(source: Any, name: str, shape: tuple[int, int], dim: int, tp: int) -> torch.Tensor:
    """The tensor put together of ``tp`` shards along ``dim``."""
    size = tuple(n // tp if d == dim else n for d, n in enumerate(shape))
    starts = [tuple(r * size[d] if d == dim else 0 for d in (0, 1)) for r in range(tp)]
    return torch.cat([source.read(name, Box(start, size)) for start in starts], dim)


def check_against(directory: Path, module: str, wanted: torch.Tensor) -> None:
    """Whole, and as shards of tensor parallelism joined: bit for bit in the dtype of ``wanted``."""
    source = open_source(directory)
    name, shape = f"{module}.weight", tuple(wanted.shape)
    found = [source.read(name, Box((0, 0), shape))]
    cuts = [(dim, tp) for dim in (0, 1) for tp in (2, 3, 4, 7, 8) if shape[dim] % tp == 0]
    found += [joined(source, name, shape, dim, tp) for dim, tp in cuts]
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


# Columns that fill their last word in part, and what producers write otherwise


def test_columns_that_fill_no_whole_word(tmp_path: Path) -> None:
    """compressed-tensors pads them, and says the shape."""
    codes = torch.randint(0, 16, (8, 100), dtype=torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, 4)).to(torch.int32)
    words = (padded.unflatten(1, (-1, 8)) << (torch.arange(8, dtype=torch.int32) * 4)).sum(-1)
    scale = torch.rand(8, 4).half() + 0.5
    tensors = {
        "weight_packed": words.to(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([8, 100]),
    }
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    write(tmp_path, config, {f"{MODULE}.{n}": t for n, t in tensors.items()})
    wanted = (codes.float() - 8) * scale.float()[:, torch.arange(100) // 32]
    check_against(tmp_path, MODULE, wanted)
    part = open_source(tmp_path).read(f"{MODULE}.weight", Box((2, 90), (3, 10)))
    assert torch.equal(part, wanted[2:5, 90:])


def test_a_router_that_auto_round_packed(tmp_path: Path) -> None:
    """It is decoded like any weight; nothing of the source's config reaches the model."""
    router = "model.layers.0.mlp.gate"
    stored = {f"{router}.{n}": t for n, t in golden("auto_gptq_sym8").items() if n != "weight"}
    extra = {router: {"bits": 8}, ".gate_proj": {"bits": 16, "data_type": "float"}}
    config = {**CASES["auto_gptq_sym4"], "extra_config": extra}
    directory = write(tmp_path, config, stored | {f"{MODULE}.weight": torch.ones(4, 4)})
    check_against(directory, router, golden("auto_gptq_sym8")["weight"].t())
    source = open_source(directory)
    assert {name: source.info(name).dtype for name in source} == {
        f"{router}.weight": torch.float32,
        f"{MODULE}.weight": torch.float32,
    }


def test_a_plain_matrix_is_not_quantized_whatever_targets_say(tmp_path: Path) -> None:
    """llm-compressor's target ``Linear`` has no routers, which newer models make no linears."""
    router, w_NK = "model.layers.0.mlp.gate.weight", torch.randn(8, 32).bfloat16()
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    write(tmp_path, config | {"config_groups": groups}, {router: w_NK})
    assert torch.equal(open_source(tmp_path).read(router, Box((0, 0), (8, 32))), w_NK)


# Errors that the tests of bad input on several ranks do not have


def refused(directory: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        check_weights(open_source(directory), ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g_idx": torch.zeros(100, dtype=torch.int32)}, r"g_idx is torch.int32 \[100\], but the "),
        ({"g_idx": torch.zeros(224)}, r"g_idx is torch.float32 \[224\]"),
        ({"qzeros": None}, r"no tensor .*o_proj.qzeros, though config.json says .* is int4;"),
        ({"scales": torch.ones(4, 16)}, r"scales is torch.float32 \[4, 16\], but the config means"),
        ({"qweight": torch.zeros(28, 32)}, "qweight is torch.float32"),
    ],
)
def test_malformed_tensors(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    refused(packed(tmp_path, "gptq_v1_sym4_act_order", **changes), message)


def test_quantization_config_that_is_no_object(tmp_path: Path) -> None:
    (write(tmp_path, None, golden("awq_fp16")) / "config.json").write_text(
        '{"quantization_config": [4]}'
    )
    refused(tmp_path, "quantization_config in config.json is no object; fetch it again")


def test_modelopt_file_without_its_section(tmp_path: Path) -> None:
    write(tmp_path, None, {"a.weight": torch.zeros(2, 2)})
    (tmp_path / "hf_quant_config.json").write_text("{}")
    refused(tmp_path, "hf_quant_config.json has no quantization section; fetch it again")


def test_permuted_columns_have_no_other_dialect(tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint(packed(tmp_path, "gptq_v1_sym4_act_order"))
    with pytest.raises(CheckpointError, match=r"not in their natural order \(g_idx\), which no"):
        checkpoint.fields(MODULE)


def test_a_format_that_is_read_alone_has_no_other_dialect(tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint(packed(tmp_path, "gptq_v1_asym8"))
    source = Source(f"{MODULE}.weight", (32, 224))
    param = Param(
        name="a.weight",
        sources=(source,),
        shape=source.shape,
        role=Role.LINEAR,
        parallel=Parallel.REPLICATED,
    )
    with pytest.raises(FormatError, match="unknown number format 'int8_asym'"):
        plan_of(checkpoint, (param,))


def decision(fmt: str, *modules: str, algorithm: str = "max") -> QuantPlan:
    slot = Slot(name="a.weight", sources=modules, shape=(32, 224))
    return QuantPlan(
        "test",
        (
            Decision(
                slot=slot,
                rule="test",
                weights=get_format(fmt, 64),
                inputs=None,
                algorithm=algorithm,
            ),
        ),
    )


def test_a_weight_without_scales_to_keep(tmp_path: Path) -> None:
    source = open_source(packed(tmp_path, "gptq_v1_sym4"))
    with pytest.raises(CheckpointError, match="other is not quantized, so it has no scales to ke"):
        keeping(decision("int4", MODULE, "model.other"), source)
    quant, _ = keeping(decision("int4", MODULE), source)
    assert quant.quantized[0].weights.field("scale").dtype == torch.float16


def test_fused_weights_whose_scales_differ_in_dtype(tmp_path: Path) -> None:
    stored = {n: t for n, t in golden("gptq_v1_sym4").items() if n != "weight"}
    other = stored | {"scales": stored["scales"].bfloat16()}
    tensors = {f"{MODULE}.{n}": t for n, t in stored.items()}
    tensors |= {f"model.other.{n}": t for n, t in other.items()}
    source = open_source(write(tmp_path, GPTQ, tensors))
    with pytest.raises(CheckpointError, match="have another dtype than those of the weights that"):
        keeping(decision("int4", MODULE, "model.other"), source)


# Contradictions: nothing is missing, so that fetching again is no way out


def test_a_packed_weight_that_the_config_excludes(tmp_path: Path) -> None:
    packed(tmp_path, "gptq_v1_sym4")
    said = {**GPTQ, "dynamic": {"-:.*o_proj": {}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    source = Source(f"{MODULE}.weight", (32, 224))
    param = Param(
        name=source.name,
        sources=(source,),
        shape=(32, 224),
        role=Role.LINEAR,
        parallel=Parallel.COLUMN,
    )
    with pytest.raises(CheckpointError) as raised:
        check_weights(open_source(tmp_path), [param])
    assert str(raised.value) == (
        f"{tmp_path}: {MODULE} is packed ({MODULE}.qweight), but quantization_config in "
        "config.json does not say that it is quantized; correct quantization_config"
    )


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (GPTQ, ("weight_packed", "weight_scale"), "qweight"),
        (FP8, ("weight", "weight_scale"), "weight_scale_inv"),
    ],
)
def test_tensors_of_another_method(
    tmp_path: Path, config: dict, tensors: tuple[str, ...], said: str
) -> None:
    found = {f"{MODULE}.{n}": torch.zeros(128, 128, dtype=torch.float8_e4m3fn) for n in tensors}
    write(tmp_path, config, found)
    others = ", ".join(n for n in tensors if n != "weight")
    wanted = rf"no tensor .*o_proj\.{said}, .*: it has {others}; correct quantization_config$"
    with pytest.raises(CheckpointError, match=wanted):
        open_source(tmp_path).info(f"{MODULE}.weight")


def test_a_plain_weight_that_the_config_quantizes(tmp_path: Path) -> None:
    scale = torch.ones(1, 1)
    plain = torch.zeros(128, 128, dtype=torch.bfloat16)
    write(tmp_path, FP8, {f"{MODULE}.weight": plain, f"{MODULE}.weight_scale": scale})
    wanted = r"its weight is plain \(torch.bfloat16\); list it as not quantized$"
    with pytest.raises(CheckpointError, match=wanted):
        open_source(tmp_path).info(f"{MODULE}.weight")
