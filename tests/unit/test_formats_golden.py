"""Our bytes against those of the tools that define the formats (tests/golden/make_golden.py)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_quant.formats import amax, decode, encode, get_format, tensor_scale

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {name: load_file(GOLDEN / f"{name}.safetensors") for name in ("fp8", "nvfp4", "int4")}
CASES = [
    (name, key.removesuffix(".input"))
    for name, tensors in FILES.items()
    for key in tensors
    if key.endswith(".input")
]


def bits(t):
    """The tensor's bytes: equal bits, not equal values."""
    return t.contiguous().view(-1).view(torch.uint8)


def golden(name, case):
    prefix = f"{case}."
    return {k.removeprefix(prefix): t for k, t in FILES[name].items() if k.startswith(prefix)}


def format_of(name, case):
    return get_format(name, 32 if case.startswith("group32") else None)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_encode_equals_golden_bytes(name, case):
    want, fmt = golden(name, case), format_of(name, case)
    fields = encode(want["input"], fmt, want.get("dscale"))
    for field in fmt.fields:
        if field.name in want:
            got = fields[field.name]
            assert got.dtype == want[field.name].dtype == field.dtype
            assert got.shape == want[field.name].shape == field.shape(*want["input"].shape)
            assert torch.equal(bits(got), bits(want[field.name])), field.name


@pytest.mark.parametrize(("name", "case"), CASES)
def test_decode_equals_golden_values(name, case):
    # Values, not bits: ModelOpt reads E2M1's code 8 as 0.0, the hardware and we as -0.0.
    want, fmt = golden(name, case), format_of(name, case)
    scalar = {fmt.fields[-1].name: want["dscale"]} if fmt.tensor_scale else {}
    got = decode({**want, **scalar}, fmt, want["decoded"].dtype)
    assert got.dtype == want["decoded"].dtype
    assert torch.equal(got, want["decoded"])


@pytest.mark.parametrize(("name", "case"), [c for c in CASES if c[1] == "random_bf16"])
def test_tensor_scale_equals_golden(name, case):
    want, fmt = golden(name, case), format_of(name, case)
    if fmt.tensor_scale:
        assert torch.equal(tensor_scale(amax(want["input"]), fmt), want["dscale"])
