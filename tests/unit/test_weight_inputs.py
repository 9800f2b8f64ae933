"""Inputs of weights are found by the weight, whatever product multiplies them, and replaced."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_quant.weight_inputs import Watched, WeightInputs

W_NK = torch.randn(4, 6)
W_EKN = torch.randn(3, 6, 4)
W_ENK = torch.randn(3, 4, 6)
X_TK = torch.randn(5, 6)
X_ETK = torch.randn(3, 5, 6)
B_N = torch.randn(4)

PRODUCTS = {
    "linear": lambda x: F.linear(x, W_NK),
    "linear with bias": lambda x: F.linear(x, W_NK, B_N),
    "batches": lambda x: F.linear(x[None], W_NK)[0],
    "x @ w.T": lambda x: x @ W_NK.T,
    "w @ x.T": lambda x: (W_NK @ x.T).T,
    "one of a stack": lambda x: x @ W_EKN[1],
    "one of a transposed stack": lambda x: F.linear(x, W_ENK[1]),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=list(PRODUCTS))
@pytest.mark.parametrize("inference", [False, True])
def test_an_input_is_seen_with_its_channels_last_and_replaced(product, inference) -> None:
    seen: list[tuple[str, torch.Tensor]] = []

    def double(key: str, x: torch.Tensor) -> torch.Tensor:
        seen.append((key, x))
        return 2 * x

    stacks = [
        Watched(w, tuple(f"{name}{e}" for e in range(3)))
        for name, w in (("a", W_EKN), ("b", W_ENK))
    ]
    with torch.inference_mode(inference), WeightInputs([Watched(W_NK, ("w",)), *stacks], double):
        out = product(X_TK)
    ((key, x),) = seen
    assert key in ("w", "a1", "b1")
    assert torch.equal(x, X_TK)
    torch.testing.assert_close(out, product(2 * X_TK))


def test_a_whole_stack_hands_over_each_experts_input() -> None:
    seen = {}

    def only_one(key: str, x: torch.Tensor) -> torch.Tensor | None:
        seen[key] = x
        return torch.zeros_like(x) if key == "b" else None

    with WeightInputs([Watched(W_EKN, ("a", "b", "c"))], only_one):
        out = torch.bmm(X_ETK, W_EKN)
    assert all(torch.equal(seen[key], x) for key, x in zip("abc", X_ETK, strict=True))
    expected = torch.bmm(X_ETK, W_EKN)
    expected[1] = 0
    torch.testing.assert_close(out, expected)


def test_parameters_of_one_storage_are_told_apart() -> None:
    whole = torch.randn(100)
    first, second = whole[10:34].view(4, 6), whole[34:58].view(4, 6)
    seen = []
    watched = [Watched(second, ("second",)), Watched(first, ("first",))]
    with WeightInputs(watched, lambda key, x: seen.append(key)):
        for start in (0, 10, 34, 58):
            F.linear(X_TK, whole[start : start + 24].view(4, 6))
    assert seen == ["first", "second"]


def test_what_the_function_computes_is_not_seen() -> None:
    calls = []

    def project(key: str, x: torch.Tensor) -> None:
        calls.append(F.linear(x, W_NK).shape)

    with WeightInputs([Watched(W_NK, ("w",))], project):
        F.linear(X_TK, W_NK)
    assert calls == [(5, 4)]


class Rows(TorchDispatchMode):
    """Notes how many rows each product has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.add(len(args[-2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [None, B_N.bfloat16()])
def test_numbers_of_rows_are_few_and_no_value_depends_on_them(bias) -> None:
    x_TK, w_NK = torch.randn(600, 6).bfloat16(), W_NK.bfloat16()
    sizes, given = range(2, 601, 7), []
    plain = [F.linear(x_TK[:tokens], w_NK, bias) for tokens in sizes]
    with Rows() as rows, WeightInputs([Watched(w_NK, ("w",))], lambda key, x: given.append(len(x))):
        found = [F.linear(x_TK[:tokens], w_NK, bias) for tokens in sizes]
    assert given == list(sizes)
    assert len(rows.seen) == 22 < len(sizes)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_products_in_fp32_keep_their_rows() -> None:
    with Rows() as rows, WeightInputs([]):
        F.linear(torch.randn(9, 6), W_NK)
    assert rows.seen == {9}
