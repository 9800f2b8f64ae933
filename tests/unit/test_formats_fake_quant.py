"""Fake quant gives the values that an export stores."""

import pytest
import torch

from megatron_quant.formats import (
    amax,
    block_stat,
    decode,
    encode,
    fake_quant,
    get_format,
    stack_amax,
    tensor_scale,
)
from tests.unit.formats_world import ALL, bits, every_dtype, every_format

SHAPES = [(1, 32), (7, 224), (3, 5, 160), (2, 600, 512), (0, 32), (2, 0, 32)]


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


def inputs(shape, dtype):
    """Normal values, with zeros of both signs, outliers and tiny ones among them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    flat = x.view(-1)
    flat[::7], flat[1::7], flat[2::31], flat[3::31] = 0.0, -0.0, 30.0, -1e-6
    return x.to(dtype)


@every_format
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_decoded_encoding(fmt, dtype, shape):
    x = inputs(shape, dtype)
    scales = [tensor_scale(amax(x), fmt) if fmt.tensor_scale else None]
    if len(shape) == 3 and fmt.tensor_scale:
        scales.append(tensor_scale(stack_amax(x), fmt))
    stats = [None] if fmt.stat_block is None else [None, 0.7 * block_stat(x, fmt)]
    for dscale in scales:
        for stat in stats:
            got = fake_quant(x, fmt, dscale, stat)
            assert got.dtype == dtype and got.shape == x.shape
            assert same_bits(got, decode(encode(x, fmt, dscale, stat), fmt, dtype))


@pytest.mark.parametrize("fmt", [f for f in ALL if f.name != "fp8_block"], ids=lambda f: f.name)
def test_activations_of_any_rank(fmt):
    x = inputs((4, 6, 32), torch.bfloat16)
    dscale = torch.tensor(0.01)
    want = fake_quant(x.view(24, 32), fmt, dscale)
    assert same_bits(fake_quant(x, fmt, dscale), want)
    assert same_bits(fake_quant(x.view(2, 2, 6, 32), fmt, dscale), want)
    assert same_bits(
        fake_quant(x.transpose(0, 1), fmt, dscale), want.view(4, 6, 32).transpose(0, 1)
    )
    assert same_bits(fake_quant(x[0, 0], fmt, dscale), want[0])


@every_format
def test_gradient_passes_straight_through(fmt):
    x = inputs((2, 4, 128), torch.float32).requires_grad_()
    dscale = torch.tensor(1e-4)  # most values saturate
    grad = torch.randn(2, 4, 128)
    fake_quant(x, fmt, dscale).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "fp8_channel", "mxfp8"])
def test_nan_stays_visible(name):
    x = torch.ones(1, 32)
    x[0, 3] = torch.nan
    assert fake_quant(x, get_format(name), torch.tensor(1.0))[0, 3].isnan()


@every_format
def test_input_is_left_alone(fmt):
    x = inputs((4, 128), torch.float32)
    stat = block_stat(x, fmt) if fmt.stat_block else None
    before = x.clone()
    fake_quant(x, fmt, torch.tensor(0.1), stat)
    encode(x, fmt, torch.tensor(0.1), stat)
    assert same_bits(x, before)
    assert stat is None or same_bits(stat, block_stat(x, fmt))
