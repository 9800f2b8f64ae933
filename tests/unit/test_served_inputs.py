"""Weights that give back what 4-bit codes of their inputs lose."""

import pytest
import torch

from megatron_quant.errors import CalibrationError
from megatron_quant.formats import (
    MSE_MULTIPLIERS,
    block_stat,
    choose,
    errors,
    fake_quant,
    get_format,
    scales_of,
    tensor_scale,
)
from megatron_quant.formats import amax as amax_of
from megatron_quant.rounding import correction, gptq, serve_
from tests.unit.gptq_world import inputs

NVFP4 = get_format("nvfp4")
COLS = 128


def served(tokens: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose columns know of one another, and the values of their codes."""
    mix = torch.randn(COLS // 4, COLS, generator=torch.Generator().manual_seed(1))
    x = inputs(tokens, COLS // 4) @ mix + 0.01 * inputs(tokens, COLS, seed=2)
    return x, fake_quant(x, NVFP4, tensor_scale(amax_of(x), NVFP4))


def sums(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    moment, lost = x.T @ x, (x - y).T @ y
    serve_(moment, lost)
    return moment, lost


def weight(rows: int = 48) -> torch.Tensor:
    return torch.randn(rows, COLS, generator=torch.Generator().manual_seed(3)).bfloat16()


def missed(w: torch.Tensor, x: torch.Tensor, new: torch.Tensor, y: torch.Tensor) -> float:
    """|W x - W' y|^2, of |W x|^2."""
    want = x.double() @ w.double().T
    return float((want - y.double() @ new.double().T).square().sum() / want.square().sum())


def test_sums_become_those_of_the_codes_and_of_their_noise() -> None:
    x, y = (t.double() for t in served())
    moment, _ = sums(x, y)
    torch.testing.assert_close(moment, y.T @ y + (x - y).T @ (x - y))


def test_the_weights_are_those_of_least_squares() -> None:
    x, y = served()
    moment, lost = sums(x, y)
    w = weight().float()
    new = correction(moment, lost, "w").apply(w)
    damped = moment.double() + 0.02 * moment.diagonal().double().mean() * torch.eye(COLS)
    want = w.double() + w.double() @ lost.double() @ torch.linalg.inv(damped)
    torch.testing.assert_close(new.double(), want, rtol=1e-5, atol=1e-5)
    assert missed(w, x, new, y) < 0.8 * missed(w, x, w, y)


def test_gptq_loses_less_of_the_outputs_with_them() -> None:
    x, y = served()
    moment, lost = sums(x, y)
    w, found = weight(), {}
    for how, target, h in (
        ("plain", w, x.T @ x),
        ("served", correction(moment, lost, "w").apply(w), moment),
    ):
        dscale, stat = tensor_scale(amax_of(w), NVFP4), block_stat(target, NVFP4)
        tried = errors(target, NVFP4, dscale, stat, MSE_MULTIPLIERS)
        stat = stat * choose(tried, MSE_MULTIPLIERS).unsqueeze(-1)
        rounded = gptq(target, NVFP4, scales_of(target, NVFP4, dscale, stat), h)
        found[how] = missed(w, x, rounded.w, y)
    assert found["served"] < 0.8 * found["plain"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_does_not_depend_on_those_beside_it(dtype: torch.dtype) -> None:
    given = correction(*sums(*served()), "w")
    w = (weight() * torch.logspace(-3, 3, 48).unsqueeze(1)).to(dtype)
    new = given.apply(w)
    assert new.dtype == dtype and not torch.equal(new, w)
    assert torch.equal(torch.cat([given.apply(part) for part in w.split([1, 7, 40])]), new)


def test_codes_that_lose_nothing_change_no_weight() -> None:
    x = served()[1]
    w = weight()
    w[3] = 0
    assert torch.equal(correction(*sums(x, x), "w").apply(w), w)
    silent = torch.zeros(COLS, COLS)
    assert torch.equal(correction(silent, silent, "w").apply(w), w)


def test_sums_that_are_not_finite_are_named() -> None:
    moment, lost = sums(*served())
    lost[3, 5] = torch.inf
    serve_(moment, lost)
    with pytest.raises(CalibrationError, match=r"inputs of layers\.0\.w is not finite"):
        correction(moment, lost, "layers.0.w")
