"""The bytes of transposed packings against AutoRound's packers (tests/golden/make_packing.py)."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_quant.ckpt.dialects import packing
from megatron_quant.ckpt.dialects.auto_round import AutoRound
from megatron_quant.ckpt.dialects.awq import Awq
from megatron_quant.ckpt.dialects.base import SHAPE, Dialect
from megatron_quant.ckpt.dialects.gptq import Gptq
from megatron_quant.formats.spec import CHANNEL, Format, get_format

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "packing.safetensors")
CASES: dict[str, tuple[Dialect, Format]] = {
    "gptq_int4": (Gptq(), get_format("int4", 32)),
    "gptq_int4_channel": (Gptq(), get_format("int4", CHANNEL)),
    "gptq_int4_asym": (Gptq(), get_format("int4_asym", 64)),
    "gptq_int8_group": (Gptq(), get_format("int8_group", 32)),
    "awq_int4": (Awq(), get_format("int4", 64)),
    "awq_int4_asym": (Awq(), get_format("int4_asym", 32)),
    "mx_mxfp4": (AutoRound(), get_format("mxfp4")),
    "mx_mxfp8": (AutoRound(), get_format("mxfp8")),
}


def golden(case: str) -> dict[str, torch.Tensor]:
    prefix = f"{case}."
    found = {k.removeprefix(prefix): t for k, t in GOLDEN.items() if k.startswith(prefix)}
    return found | {SHAPE: torch.tensor((64, 128))}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("case", CASES)
def test_their_packers_give_our_bytes(case):
    dialect, fmt = CASES[case]
    tensors = golden(case)
    for stored in dialect.stored(fmt, None):
        if stored.optional:
            continue
        ours, theirs = stored.to_disk(tensors[stored.field]), tensors[stored.suffix]
        assert ours.shape == theirs.shape == stored.shape(64, 128), stored.suffix
        if stored.suffix == "scales":  # theirs are fp16, ours keep the codec's dtype
            assert ours.dtype == stored.dtype == torch.bfloat16 and theirs.dtype in stored.also
            theirs = theirs.to(ours.dtype)
        assert torch.equal(bits(ours), bits(theirs)), stored.suffix


@pytest.mark.parametrize("case", CASES)
def test_what_they_pack_is_read(case):
    dialect, fmt = CASES[case]
    tensors = golden(case)
    for stored in dialect.stored(fmt, None):
        if stored.field == SHAPE:
            continue
        field = stored.from_disk(tensors[stored.suffix])
        wanted = tensors[stored.field]
        assert torch.equal(bits(field.to(wanted.dtype)), bits(wanted)), stored.suffix


def test_hand_packed_words():
    """Element i of a GPTQ word is at bits 4i; AWQ's order of a run is 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = torch.arange(8, dtype=torch.uint8)
    in_order = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert torch.equal(packing.packed(codes[None], 4), in_order)
    zeros_N1 = codes[:, None]
    assert torch.equal(packing.along_rows(zeros_N1), in_order)
    assert torch.equal(packing.gptq_zeros(zeros_N1, 0), in_order)
    assert packing.gptq_zeros(zeros_N1, 1).item() == 0x6543210F
    assert packing.awq_zeros(zeros_N1).item() == 0x75316420


def test_symmetric_zeros_and_group_index():
    shape = torch.tensor((16, 100))
    zeros = packing.constant_zeros(shape, 4, 32, 7)
    assert torch.equal(zeros, torch.full((4, 2), 0x77777777, dtype=torch.int32))
    assert packing.constant_zeros(shape, 8, -1, 127).tolist() == [[0x7F7F7F7F] * 4]
    index = packing.group_index(shape, 32)
    assert index.dtype == torch.int32 and index.tolist() == [k // 32 for k in range(100)]
    assert not packing.group_index(shape, -1).any()


WORDS = torch.randint(-(2**31), 2**31, (16, 8), dtype=torch.int64).to(torch.int32)
CODES = torch.randint(0, 16, (16, 6), dtype=torch.uint8)
V1, FROM_V1 = partial(packing.gptq_zeros, offset=1), partial(packing.from_gptq_zeros, offset=1)
V2, FROM_V2 = partial(packing.gptq_zeros, offset=0), partial(packing.from_gptq_zeros, offset=0)
WIDE, FROM_WIDE = (partial(f, bits=8) for f in (V1, FROM_V1))
PAIRS = {
    "gptq 1, 8 bits": (WIDE, FROM_WIDE, CODES),
    "rows, 8 bits": (packing.along_rows_8, packing.from_along_rows_8, CODES),
    "rows": (packing.along_rows, packing.from_along_rows, CODES),
    "gptq 1": (V1, FROM_V1, CODES),
    "gptq 2": (V2, FROM_V2, CODES),
    "awq words": (packing.awq_words, packing.from_awq_words, WORDS),
    "awq zeros": (packing.awq_zeros, packing.from_awq_zeros, CODES),
    "row pairs": (packing.row_pairs, packing.from_row_pairs, WORDS),
}


@pytest.mark.parametrize("name", PAIRS)
def test_round_trip(name):
    to_disk, from_disk, value = PAIRS[name]
    assert torch.equal(from_disk(to_disk(value)), value)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("rows", (slice(1, 2), slice(2, 5))),
        ("gptq 1", (slice(2, 5), slice(1, 2))),
        ("awq words", (slice(16, 40), slice(1, 2))),
        ("awq zeros", (slice(2, 5), slice(1, 2))),
        ("row pairs", (slice(4, 8), slice(16, 40))),
    ],
)
def test_packing_commutes_with_slices(name, stored):
    to_disk, _, value = PAIRS[name]
    assert torch.equal(to_disk(value[8:16, 2:5]), to_disk(value)[stored])
