"""The gradient by a block's scale, against autograd through a plain form of it."""

import pytest
import torch

from megatron_quant.formats import get_format
from megatron_quant.rounding import scale_gradient

GROUP = 32


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("first", [0, 8])
def test_it_is_that_of_learned_step_sizes(first: int) -> None:
    """Some values saturate; ``first``: a piece that begins within a block."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 3, 128 - first, generator=generator)
    g = torch.randn(w.shape, generator=generator)
    block = torch.arange(first, 128) // GROUP
    log = torch.full((2, 3, 128 // GROUP), 0.1).log().add_(torch.rand(2, 3, 4)).requires_grad_()
    scale = log.exp()[..., block]
    ratio = w / scale
    q = Round.apply(ratio.clamp(-8, 7)) * scale
    assert (ratio > 7.5).any() and (ratio < -8.5).any()
    (q * g).sum().backward()
    end = torch.where(w > 0, 7 * scale, -8 * scale).detach()
    found = scale_gradient(w, q.detach(), end, g, get_format("int4", GROUP), first)
    torch.testing.assert_close(found, log.grad, rtol=1e-5, atol=1e-6)
