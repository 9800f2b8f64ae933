"""The kernels of the CPU room against torch's own operations and their gradients."""

import pytest
import torch
from torch.nn import functional as F

from megatron_quant.cpu import gemm, kernels, norm, softmax
from megatron_quant.errors import HostError

TE_DTYPE = {torch.float32: 4, torch.float16: 5, torch.bfloat16: 6}
DTYPES = pytest.mark.parametrize("dtype", list(TE_DTYPE))
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _gemm(a, transa, b, transb, out=None, bias=None, grad=False, accumulate=False, alpha=1.0):
    out_dtype = TE_DTYPE[a.dtype] if out is None else None
    bias_dtype = TE_DTYPE[a.dtype]
    workspace = torch.empty(0)
    return gemm.generic_gemm(
        *(a, transa, b, transb, out, None, out_dtype, bias, bias_dtype, False, None),
        *(grad, workspace, 0, accumulate, False),
        alpha=alpha,
    )


def _grouped(a, transa, b, transb, outs, splits, bias=None, grad=False, accumulate=False):
    bias = [torch.empty(0)] * len(a) if bias is None else bias
    single = len(outs) == 1
    return gemm.te_general_grouped_gemm(
        *(a, transa, b, transb, outs, 4, splits, bias, 4, single, [], grad, [], 0),
        *(accumulate, False),
    )


@DTYPES
def test_linear_forward(dtype):
    x, w, bias = (torch.randn(*shape, dtype=dtype) for shape in ((2, 5, 8), (6, 8), (6,)))
    got, bias_grad, _, _ = _gemm(w, True, x, False, bias=bias)
    torch.testing.assert_close(got, F.linear(x, w, bias), **TOLERANCE[dtype])
    assert bias_grad is None


@DTYPES
def test_linear_backward(dtype):
    x, w = torch.randn(5, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    dy = torch.randn(5, 6, dtype=dtype)
    dx, _, _, _ = _gemm(w, False, dy, False)
    dw, bias_grad, _, _ = _gemm(x, False, dy, True, bias=torch.empty(6), grad=True)
    torch.testing.assert_close(dx, dy @ w, **TOLERANCE[dtype])
    torch.testing.assert_close(dw, dy.t() @ x, **TOLERANCE[dtype])
    torch.testing.assert_close(bias_grad, dy.sum(0), **TOLERANCE[dtype])


def test_gemm_into_a_given_output():
    w, x, out = torch.randn(6, 8), torch.randn(5, 8), torch.ones(5, 6)
    got, _, _, _ = _gemm(w, True, x, False, out=out, accumulate=True, alpha=2.0)
    assert got is out
    torch.testing.assert_close(out, 1 + 2 * (x @ w.t()))


def test_gemm_of_bf16_into_float32_is_not_rounded_to_bf16():
    w, x = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(5, 8, dtype=torch.bfloat16)
    out, _, _, _ = _gemm(w, True, x, False, out=torch.empty(5, 6))
    assert torch.equal(out, x.float() @ w.float().t())


@DTYPES
def test_grouped_forward_with_biases_and_an_expert_without_tokens(dtype):
    splits = [3, 0, 2]
    x, weights = torch.randn(5, 8, dtype=dtype), list(torch.randn(3, 6, 8, dtype=dtype))
    biases = list(torch.randn(3, 6, dtype=dtype))
    out = torch.empty(5, 6, dtype=dtype)
    _grouped(weights, True, torch.split(x, splits), False, [out], splits, biases)
    parts = zip(torch.split(x, splits), weights, biases, strict=True)
    want = torch.cat([F.linear(p, w, b) for p, w, b in parts])
    torch.testing.assert_close(out, want, **TOLERANCE[dtype])


def test_grouped_weight_gradients():
    splits = [3, 0, 2]
    xs, dys = torch.randn(5, 8).split(splits), torch.randn(5, 6).split(splits)
    before = torch.ones(6, 8)
    outs, bias_grads = [before.clone() for _ in splits], [torch.full((6,), 7.0) for _ in splits]
    _grouped(xs, False, dys, True, outs, splits, bias_grads, grad=True, accumulate=True)
    for x, dy, out, bias_grad in zip(xs, dys, outs, bias_grads, strict=True):
        torch.testing.assert_close(out, before + dy.t() @ x)
        torch.testing.assert_close(bias_grad, dy.sum(0))
    _grouped(xs, False, dys, True, outs, splits)
    assert torch.equal(outs[1], torch.zeros(6, 8))


@DTYPES
@pytest.mark.parametrize("zero_centered", [False, True])
def test_rmsnorm(dtype, zero_centered):
    x = torch.randn(5, 8, dtype=dtype).requires_grad_()
    w = torch.randn(8, dtype=dtype).requires_grad_()
    dy = torch.randn(5, 8, dtype=dtype)
    scale = w + 1 if zero_centered else w
    want = F.rms_norm(x, (8,), scale, 1e-5)
    dx, dw = torch.autograd.grad(want, (x, w), dy)
    x, w = x.detach(), w.detach()
    y, _, rsigma = norm.rmsnorm_fwd(x, w, 1e-5, None, None, TE_DTYPE[dtype], 0, zero_centered)
    got = norm.rmsnorm_bwd(dy, x, rsigma, w, 0, zero_centered)
    for a, b in zip((y, *got), (want, dx, dw), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])


@DTYPES
def test_layernorm(dtype):
    x, w, b = (torch.randn(*s, dtype=dtype).requires_grad_() for s in ((5, 8), (8,), (8,)))
    dy, out = torch.randn(5, 8, dtype=dtype), torch.empty(5, 8, dtype=dtype)
    want = F.layer_norm(x, (8,), w, b, 1e-5)
    gradients = torch.autograd.grad(want, (x, w, b), dy)
    x, w, b = x.detach(), w.detach(), b.detach()
    y, mu, rsigma = norm.layernorm_fwd(x, w, b, 1e-5, out, None, TE_DTYPE[dtype], 0, False)
    got = norm.layernorm_bwd(dy, x, mu, rsigma, w, 0, False)
    assert y is out
    for a, c in zip((y, *got), (want, *gradients), strict=True):
        torch.testing.assert_close(a, c, **TOLERANCE[dtype])


@DTYPES
def test_softmax(dtype):
    x = torch.randn(2, 2, 3, 4, dtype=dtype).requires_grad_()
    dy = torch.randn_like(x)
    want = torch.softmax(x * 0.5, -1)
    (dx,) = torch.autograd.grad(want, x, dy)
    y = softmax.scaled_softmax_forward(x.detach(), 0.5)
    torch.testing.assert_close(y, want, **TOLERANCE[dtype])
    got = softmax.scaled_softmax_backward(dy, y, 0.5)
    torch.testing.assert_close(got, dx, **TOLERANCE[dtype])


def test_masked_softmax():
    x, mask = torch.randn(2, 2, 3, 4), torch.zeros(2, 1, 3, 4, dtype=torch.uint8)
    mask[0, 0, 0, 2:] = 1
    mask[1, 0, 1] = 1
    y = softmax.scaled_masked_softmax_forward(x, mask, 0.5)
    torch.testing.assert_close(y[0, :, 0, :2], torch.softmax(x[0, :, 0, :2] * 0.5, -1))
    assert torch.equal(y[0, :, 0, 2:], torch.zeros(2, 2))
    assert torch.equal(y[1, :, 1], torch.zeros(2, 4))


def test_causal_softmax_lets_the_last_query_see_every_key():
    x = torch.randn(1, 2, 3, 5)
    y = softmax.causal_softmax_forward(x, 1.0)
    torch.testing.assert_close(y[..., 2, :], torch.softmax(x[..., 2, :], -1))
    torch.testing.assert_close(y[..., 0, :3], torch.softmax(x[..., 0, :3], -1))
    assert torch.equal(y[..., 0, 3:], torch.zeros(1, 2, 2))


def test_what_a_kernel_does_not_do_is_refused():
    w, x = torch.randn(6, 8), torch.randn(5, 8)
    with pytest.raises(HostError, match="grouped_gemm of str on a CPU: switch off fp8"):
        _grouped(["quantized"], True, [x], False, [torch.empty(5, 6)], [5])
    with pytest.raises(HostError, match="generic_gemm with gelu on a CPU"):
        gemm.generic_gemm(
            *(w, True, x, False, None, None, 4, None, 4, True, None),
            *(False, torch.empty(0), 0, False, False),
        )
    with pytest.raises(HostError, match="rmsnorm_fwd with a quantized output"):
        norm.rmsnorm_fwd(x, w[0], 1e-5, None, object(), 4, 0, False)
    with pytest.raises(HostError, match="dtype 7 on a CPU"):
        gemm.torch_dtype(7)
    with pytest.raises(HostError, match="kernel moe_permute_fwd has no CPU version"):
        kernels.lacking("moe_permute_fwd")()
