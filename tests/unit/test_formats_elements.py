"""Element rounding against brute force, over every quotient that can be a tie."""

import pytest
import torch

from megatron_quant.formats.numbers.elements import (
    E2M1_VALUES,
    INT4_VALUES,
    INT8_WORDS,
    e2m1_codes,
    e4m3,
    e4m3_values,
    int4_codes,
    int8_codes,
)
from megatron_quant.formats.numbers.pack import nibble_values, pack_nibbles
from megatron_quant.formats.numbers.scales import e8m0_values

ALL_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FINITE = ALL_BF16[ALL_BF16.isfinite()].float()


def nearest_even(x, values):
    """Index of the value nearest to x; of two equally near ones the even index."""
    distance = (x.double()[:, None] - torch.tensor(values).double()).abs()
    ties = distance == distance.min(1, keepdim=True).values
    even = ties & (torch.arange(len(values)) % 2 == 0)
    return torch.where(even.any(1), even.int().argmax(1), ties.int().argmax(1))


def neighbours(x):
    """x and the fp32 numbers beside it."""
    return torch.cat(
        [x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(-torch.tensor(torch.inf))]
    )


def test_e2m1_codes_of_every_bf16_and_beside_ties():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0])
    x = torch.cat([FINITE, neighbours(ties), neighbours(-ties)])
    want = nearest_even(x.abs().clamp(max=6), E2M1_VALUES[:8]) + 8 * (x < 0)
    assert torch.equal(e2m1_codes(x.clone()), want.to(torch.uint8))


def test_int4_codes_of_every_bf16_and_beside_ties():
    x = torch.cat([FINITE, neighbours(torch.arange(-8.5, 9))])
    want = nearest_even(x.clamp(-8, 7), INT4_VALUES)
    assert torch.equal(int4_codes(x.clone()), want.to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_codes_of_every_bf16_and_beside_ties(dtype):
    x = torch.cat([FINITE, neighbours(torch.arange(-128.5, 129))]).to(dtype)
    want = nearest_even(x.float().clamp(-128, 127), tuple(map(float, range(-128, 128)))) - 128
    assert torch.equal(int8_codes(x.clone()), want.to(torch.int8))


def test_int8_words_hold_element_i_at_byte_i_offset_by_128():
    words = INT8_WORDS.store(torch.tensor([[-128.0, -127, 0, 127]]))
    assert words.view(torch.uint8).tolist() == [[0, 1, 128, 255]]
    assert INT8_WORDS.load(words).tolist() == [[-128, -127, 0, 127]]


def test_e8m0_values_are_powers_of_two():
    codes = torch.tensor([[0, 1, 127, 128], [200, 254, 255, 126]], dtype=torch.uint8)
    want = [[2.0**-127, 2.0**-126, 1.0, 2.0], [2.0**73, 2.0**127, torch.nan, 0.5]]
    assert torch.equal(e8m0_values(codes).nan_to_num(-1), torch.tensor(want).nan_to_num(-1))


def test_e4m3_of_every_bf16():
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    want = nearest_even(FINITE.abs().clamp(max=448), values) + 128 * FINITE.signbit()
    assert torch.equal(e4m3(FINITE.clone()).view(torch.uint8), want.to(torch.uint8))


def test_e4m3_saturates_infinity_and_keeps_nan():
    got = e4m3(torch.tensor([torch.inf, -torch.inf, torch.nan])).float()
    assert got[:2].tolist() == [448.0, -448.0]
    assert got[2].isnan()


def test_e4m3_values_are_those_of_the_cast():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    got, want = e4m3_values(every), every.float()
    assert torch.equal(
        got.nan_to_num(1e9).view(torch.int32), want.nan_to_num(1e9).view(torch.int32)
    )


def test_nibbles_keep_the_even_column_low():
    codes = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0xF3]]


def test_words_hold_element_i_at_bits_4i():
    word = pack_nibbles(torch.arange(8, dtype=torch.uint8)).view(torch.int32)
    assert word.tolist() == [0x76543210]


@pytest.mark.parametrize("values", [E2M1_VALUES, INT4_VALUES])
def test_every_byte_reads_as_its_two_values(values):
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    got = nibble_values(pack_nibbles(codes), values)
    want = torch.tensor(values)[codes.long()]
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))
