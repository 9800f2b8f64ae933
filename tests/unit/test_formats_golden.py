"""Our bytes against those of the tools that define the formats (tests/golden/make_golden.py)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_quant.formats import FORMATS, amax, decode, encode, get_format, tensor_scale
from megatron_quant.formats.search import FOUR_OVER_SIX_RANGE
from megatron_quant.formats.spec import CHANNEL

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = load_file(GOLDEN / "inputs.safetensors")
FILES = {n: load_file(GOLDEN / f"{n}.safetensors") for n in [*FORMATS, "nvfp4_static"]}
CASES = [
    (name, case)
    for name, tensors in FILES.items()
    for case in dict.fromkeys(key.partition(".")[0] for key in tensors)
]
# compressed-tensors gives the scale NaN (E8M0's 255) from 1.75 * 2^127 on.
NOT_FINITE = ("mxfp4", "huge_bf16")


def bits(t):
    """The tensor's bytes: equal bits, not equal values."""
    return t.contiguous().view(-1).view(torch.uint8)


def golden(name, case):
    prefix = f"{case}."
    found = {k.removeprefix(prefix): t for k, t in FILES[name].items() if k.startswith(prefix)}
    return {"input": SHARED.get(case), **found}


def format_of(name, case):
    sizes = {"channel": CHANNEL, "group32": 32, "group64": 64}
    return get_format(name.removesuffix("_static"), sizes.get(case.partition("_")[0]))


def test_every_format_has_random_zero_denormal_tie_signed_zero_and_extreme_cases():
    kinds = {"random", "zero", "subnormal", "ties", "turns", "signed", "huge", "single"}
    for name in FORMATS:
        found = {case.split("_")[0] for fmt, case in CASES if fmt == name}
        assert kinds - found <= {"ties", "turns"}, name


@pytest.mark.parametrize(("name", "case"), CASES)
def test_encode_equals_golden_bytes(name, case):
    if (name, case) == NOT_FINITE:
        pytest.skip("the tool's scale is NaN")
    want, fmt = golden(name, case), format_of(name, case)
    fields = encode(want["input"], fmt, want.get("dscale"), want.get("stat"))
    for field in fmt.fields:
        if field.name in want:
            got = fields[field.name]
            assert got.dtype == want[field.name].dtype == field.dtype
            assert got.shape == want[field.name].shape == field.shape(*want["input"].shape)
            assert torch.equal(bits(got), bits(want[field.name])), field.name


@pytest.mark.parametrize(("name", "case"), [c for c in CASES if c[1].endswith("_bf16")])
def test_decode_equals_golden_values(name, case):
    # Values, not bits: ModelOpt reads E2M1's code 8 as 0.0, the hardware and we as -0.0.
    if (name, case) == NOT_FINITE:
        pytest.skip("the tool's scale is NaN")
    want, fmt = golden(name, case), format_of(name, case)
    scalar = {fmt.fields[-1].name: want["dscale"]} if fmt.tensor_scale else {}
    got = decode({**want, **scalar}, fmt, want["decoded"].dtype)
    assert got.dtype == want["decoded"].dtype
    assert torch.equal(got, want["decoded"])


def test_four_over_six_leaves_the_largest_block_its_range():
    want, fmt = golden("nvfp4_static", "four_over_six_bf16"), get_format("nvfp4")
    largest = amax(want["input"]) * FOUR_OVER_SIX_RANGE
    assert torch.equal(tensor_scale(largest, fmt), want["dscale"])


@pytest.mark.parametrize(("name", "case"), [c for c in CASES if c[1] == "random_bf16"])
def test_tensor_scale_equals_golden(name, case):
    want, fmt = golden(name, case), format_of(name, case)
    if fmt.tensor_scale:
        assert torch.equal(tensor_scale(amax(want["input"]), fmt), want["dscale"])
