import pytest
import torch

from megatron_quant.formats import amax, get_format, stack_amax, tensor_scale

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP8, NVFP4, INT8 = (get_format(name) for name in ("fp8", "nvfp4", "int8_tensor"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_is_the_largest_magnitude(dtype):
    w = torch.randn(3, 40, 24).to(dtype)
    w[1, 2, 3] = -9
    assert amax(w).dtype == stack_amax(w).dtype == torch.float32
    assert torch.equal(amax(w), w.float().abs().max())
    assert torch.equal(stack_amax(w), w.float().abs().amax((1, 2), keepdim=True))


def test_stack_amax_over_several_chunks_of_rows():
    w = torch.randn(3, 700, 512)
    assert torch.equal(stack_amax(w), w.abs().amax((1, 2), keepdim=True))
    assert torch.equal(stack_amax(w.mT), w.abs().amax((1, 2), keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_amax_propagates_what_is_not_finite(dtype, bad):
    w = torch.ones(2, 4, 16, dtype=dtype)
    w[1, 2, 3] = bad
    assert not amax(w).isfinite()
    assert stack_amax(w).isfinite().flatten().tolist() == [True, False]


def test_amax_of_nothing_is_zero():
    assert amax(torch.empty(0, 16)).item() == 0.0
    assert stack_amax(torch.empty(2, 0, 16)).tolist() == [[[0.0]], [[0.0]]]
    assert stack_amax(torch.empty(0, 4, 16)).shape == (0, 1, 1)


def test_amax_of_zeros_is_positive_zero():
    assert not amax(torch.full((4, 16), -0.0)).signbit()


def test_tensor_scale_keeps_the_shape_of_amax():
    for shape in ((), (3, 1, 1)):
        largest = torch.full(shape, 5.0)
        assert torch.equal(tensor_scale(largest, FP8), largest / 448)
        assert torch.equal(tensor_scale(largest, NVFP4), largest / 2688)
        assert torch.equal(tensor_scale(largest, INT8), largest / 127.5)


@pytest.mark.parametrize("fmt", [FP8, NVFP4, INT8], ids=lambda f: f.name)
def test_tensor_scale_is_positive_and_normal_for_any_finite_amax(fmt):
    scale = tensor_scale(torch.tensor([0.0, 1e-45, 1e-37, 3e38]), fmt)
    assert scale[0] == 1.0
    assert (scale[1:] >= 2.0**-126).all() and scale.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tensor_scale_propagates_what_is_not_finite(bad):
    assert not tensor_scale(torch.tensor(bad), FP8).isfinite()
