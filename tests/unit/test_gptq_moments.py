"""Second moments of inputs, and their merging over ranks."""

import torch

from megatron_quant.rounding import Moments, merged
from tests.unit.formats_world import every_dtype, same_bits
from tests.unit.gptq_world import inputs


def of(x_TK, splits):
    found = Moments.of(len(splits), x_TK.shape[1])
    found.add(x_TK, splits)
    return found


@every_dtype
def test_sums_of_products_by_expert(dtype):
    x = inputs(60, 16).to(dtype)
    found = of(x, [10, 0, 50])
    want = [part.double().T @ part.double() for part in x.split([10, 0, 50])]
    assert found.sums.dtype == torch.float32 and found.tokens.tolist() == [10, 0, 50]
    torch.testing.assert_close(found.sums.double(), torch.stack(want), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.diagonal_EK, found.sums.diagonal(dim1=1, dim2=2))


def test_batches_add_up():
    x = inputs(9000, 8)
    found = Moments.of(1, 8)
    for part in x.split(1000):
        found.add(part, [len(part)])
    want = x.double().T @ x.double()
    for got in (found, of(x, [9000])):
        assert got.tokens.tolist() == [9000]
        torch.testing.assert_close(got.sums[0].double(), want, rtol=1e-5, atol=1e-2)


def test_the_same_batches_give_the_same_bits():
    parts = inputs(700, 40).bfloat16().split(100)
    first, second = (merged([of(p, [60, 40]) for p in parts]) for _ in range(2))
    assert same_bits(first.sums, second.sums)


def test_ranks_add_up_in_their_order_and_keep_their_own():
    x = inputs(90, 16)
    ranks = [of(part, [20, 10]) for part in x.split(30)]
    before = [rank.sums.clone() for rank in ranks]
    got = merged(ranks)
    want = (before[0] + before[1]) + before[2]
    assert same_bits(got.sums, want) and got.tokens.tolist() == [60, 30]
    assert all(map(same_bits, before, (rank.sums for rank in ranks)))
    assert same_bits(merged(ranks[:1]).sums, before[0])


def test_cold_experts_take_what_all_saw():
    found = of(inputs(30, 8), [0, 28, 2])
    got = found.filled()
    assert got.tokens.tolist() == [30, 28, 2]
    assert same_bits(got.sums[0], found.sums.sum(0))
    assert same_bits(got.sums[1:], found.sums[1:])
    few = found.filled(least=3)
    assert few.tokens.tolist() == [30, 28, 30] and same_bits(few.sums[2], few.sums[0])
    assert found.tokens.tolist() == [0, 28, 2]


def test_what_is_not_finite_stays_so():
    x = inputs(30, 8)
    x[3, 2] = torch.inf
    assert not of(x, [30]).sums.isfinite().all()
