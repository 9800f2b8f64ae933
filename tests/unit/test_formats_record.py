"""One record holds what is known of a number format."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_quant.errors import FormatError, RecipeError
from megatron_quant.formats import FORMATS, Format, decode, encode, fake_quant, get_format
from megatron_quant.formats.numbers.arithmetic import kernel_of
from megatron_quant.formats.record import Field
from megatron_quant.formats.spec import GROUP_SIZES, stored_format
from megatron_quant.recipes.parse import parse_recipe
from megatron_quant.recipes.schema import ALGORITHMS, SUPPORTED

ALL = [stored_format(name) for name in (*FORMATS, "int8_asym")]


def test_the_functions_of_the_face_are_no_modules() -> None:
    """Also where a module of the same name was imported first, as here by another one."""
    code = (
        "import megatron_quant.formats.grid\n"
        "from megatron_quant.formats import amax, fake_quant\n"
        "print(amax.__name__, fake_quant.__name__)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["amax", "fake_quant"]
    with pytest.raises(ImportError):
        from megatron_quant.formats import nothing  # noqa: F401


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
def test_fields_kernel_and_scales_of_a_record_fit_together(fmt: Format) -> None:
    kernel = kernel_of(fmt)
    assert fmt.fields[0].block == (1, kernel.element.packed)
    assert (fmt.largest is not None) == fmt.tensor_scale
    assert all(isinstance(field.dtype, torch.dtype) for field in fmt.fields)
    scale = kernel.scale.fields(torch.ones(1, 1, fmt.stat_parts), torch.ones(1, 1), torch.float32)
    blocks = [f.dtype for f in fmt.fields[1:] if f.block != (0, 0)]
    assert [tensor.dtype for tensor in scale] == blocks
    assert fmt.group_size in fmt.group_sizes or not fmt.group_sizes


def test_what_recipes_may_choose_follows_from_the_records() -> None:
    assert SUPPORTED == {
        "fp8": ("fp8", None),
        "fp8_channel": ("fp8_channel", None),
        "fp8_block": ("fp8_group", None),
        "int8": ("int8", "int8_tensor"),
        "int4": (None, "fp8", "fp8_channel"),
        "int4_asym": (None, "fp8"),
        "int8_group": (None,),
        "nvfp4": ("nvfp4", None),
        "mxfp8": ("mxfp8", None),
        "mxfp4": (None, "mxfp4"),
    }
    assert ALGORITHMS["max"] == tuple(SUPPORTED)
    assert set(SUPPORTED) - set(ALGORITHMS["mse"]) == {"mxfp8", "mxfp4"}
    assert ALGORITHMS["four_over_six"] == ("nvfp4",)
    assert list(GROUP_SIZES) == ["int4", "int4_asym", "int8_group", "int8_asym"]
    assert {f.name for f in ALL if f.float_bits == (4, 3)} == {
        *("fp8", "fp8_channel", "fp8_block", "fp8_group", "mxfp8")
    }
    assert {f.name for f in ALL if f.float_bits == (2, 1)} == {"nvfp4", "mxfp4"}
    bits = {f.name: f.scale_bits for f in ALL if f.scale_bits}
    assert bits == {"nvfp4": (4, 3), "mxfp8": (8, 0), "mxfp4": (8, 0)}
    assert [f.name for f in ALL if f.full_blocks] == ["nvfp4", "mxfp8", "mxfp4"]


def test_a_new_format_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """E4M3 in groups of 64 with scales that are powers of two: known everywhere at once."""
    mxfp8 = get_format("mxfp8")
    fields = (mxfp8.fields[0], Field("scale", "uint8", (1, 64)))
    wide = replace(mxfp8, name="mxfp8_wide", group_size=64, fields=fields, inputs=(None,))
    monkeypatch.setitem(FORMATS, wide.name, wide)
    rule = {"quantize": ["*"], "weights": wide.name}
    assert parse_recipe("mine", {"rules": [rule]}).rules[0].weights == wide
    with pytest.raises(RecipeError, match="algorithm mse does not search the scales of mxfp8_wide"):
        parse_recipe("mine", {"rules": [{**rule, "algorithm": "mse"}]})

    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    w[:, :64:2] *= 8  # so that both halves of a wide block have one scale
    w[:, 1] = w[:, 33] = w[:, 65] = w[:, 97] = 64.0
    stored, narrow = encode(w, wide, None), encode(w, mxfp8, None)
    assert torch.equal(stored["scale"], narrow["scale"][:, ::2])
    assert torch.equal(decode(stored, wide, torch.float32), decode(narrow, mxfp8, torch.float32))
    assert torch.equal(fake_quant(w, wide, None), decode(stored, wide, torch.float32))
    with pytest.raises(FormatError, match="mxfp8_wide needs the last dim to be a multiple of 64"):
        encode(w[:, :96], wide, None)
