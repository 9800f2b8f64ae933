"""Searched scales: exact sums, so that every layout takes the same ones."""

import pytest
import torch

from megatron_quant.errors import FormatError
from megatron_quant.formats import (
    amax,
    block_stat,
    decode,
    encode,
    fake_quant,
    get_format,
    tensor_scale,
)
from megatron_quant.formats.search import (
    FOUR_OVER_SIX,
    FOUR_OVER_SIX_RANGE,
    MSE_MULTIPLIERS,
    SearchedPiece,
    choose,
    errors,
    histogram,
    percentile_amax,
)
from tests.unit.formats_world import (
    ALL,
    COLS,
    ROWS,
    cells,
    every_blocked_format,
    every_dtype,
    every_format,
    label,
    pieces,
    same_bits,
    scale_of,
    weights,
)

FEW = (1.0, 0.8, 0.65, 1.3)
TENSOR = [f for f in ALL if f.stat_block is None]


def statistic(w, fmt):
    return block_stat(w, fmt) if fmt.stat_block else amax(w)


def dscale_of(w, fmt):
    return tensor_scale(amax(w), fmt) if fmt.tensor_scale and fmt.stat_block else None


def searched(w, fmt, multipliers):
    """Fake-quantized with the scales that the search finds."""
    stat, dscale = statistic(w, fmt), dscale_of(w, fmt)
    chosen = choose(errors(w, fmt, dscale, stat, multipliers), multipliers)
    if fmt.stat_block:
        return fake_quant(w, fmt, dscale, stat * chosen.unsqueeze(-1))
    return fake_quant(w, fmt, tensor_scale(stat * chosen, fmt))


def plain(w, fmt):
    return fake_quant(w, fmt, tensor_scale(amax(w), fmt) if fmt.tensor_scale else None)


@every_format
@every_dtype
def test_errors_are_squared_errors_by_block(fmt, dtype):
    w = weights(2, 150, 160, dtype=dtype)
    stat, dscale = statistic(w, fmt), dscale_of(w, fmt)
    got = errors(w, fmt, dscale, stat, [0.8])[0]
    given = (dscale, 0.8 * stat) if fmt.stat_block else (tensor_scale(0.8 * stat, fmt), None)
    wide = w.float()  # decoded without a rounding to dtype
    fields = encode(w, fmt, *given)
    error = (wide - decode(fields, fmt, torch.float32)).double().square()
    unit = torch.frexp(stat.amax(-1) if fmt.stat_block else stat).exponent.exp2().double().square()
    if fmt.stat_block is None:
        want = error.sum()
    else:
        rows, cols = (b or n for b, n in zip(fmt.stat_block, w.shape[1:], strict=True))
        padded = torch.nn.functional.pad(error, (0, -160 % cols, 0, -150 % rows))
        want = padded.unflatten(2, (-1, cols)).unflatten(1, (-1, rows)).sum((2, 4))
    assert got.dtype == torch.int64 and got.shape == want.shape
    torch.testing.assert_close(got.double() * 2.0**-32 * unit, want, rtol=1e-4, atol=1e-12)


@every_blocked_format
@every_dtype
def test_errors_of_pieces_add_up_to_those_of_the_whole(fmt, dtype):
    w = weights(2, ROWS, COLS, dtype=dtype)
    stat, dscale = statistic(w, fmt), dscale_of(w, fmt)
    whole = errors(w, fmt, dscale, stat, FEW)
    merged = torch.zeros_like(whole)
    for box in pieces(fmt, 4):
        touched = cells(fmt.stat_block, box)
        origin = (box[0].start, box[1].start)
        part = stat[(..., *touched, slice(None))]
        merged[(..., *touched)] += errors(
            w[(..., *box)], fmt, dscale, part, FEW, SearchedPiece(origin)
        )
    assert torch.equal(merged, whole)


@pytest.mark.parametrize("fmt", TENSOR, ids=label)
def test_errors_of_a_tensor_or_of_each_of_a_stack(fmt):
    w = weights(3, 40, 96)
    each = errors(w, fmt, None, w.float().abs().amax((1, 2), keepdim=True), FEW)
    assert each.shape == (len(FEW), 3, 1, 1)
    for e in range(3):
        assert torch.equal(errors(w[e], fmt, None, amax(w[e]), FEW), each[:, e, 0, 0])
    shared = amax(w)
    parts = [
        errors(w[:, :, cols], fmt, None, shared, FEW) for cols in (slice(0, 40), slice(40, 96))
    ]
    assert torch.equal(sum(parts), errors(w, fmt, None, shared, FEW))


@every_format
def test_the_search_never_makes_the_error_larger(fmt):
    w = weights(24, 256, dtype=torch.float32)
    before, after = ((w.float() - f.float()).square().sum() for f in (
        plain(w, fmt), searched(w.clone(), fmt, MSE_MULTIPLIERS)))  # fmt: skip
    assert after <= before * 1.0001
    assert after < before or fmt.name not in ("nvfp4", "int4", "int4_asym")


def test_four_over_six_takes_the_better_code_for_the_largest_value():
    # 6, 4 and 3 are codes; 5 is none, but 5 * 4 / 6 is near one where 6 becomes the code of 4.
    w = torch.tensor([[6.0, 4, 3, 2] * 4, [6.0, 4.5, 4.5, 4.5] * 4])
    fmt, dscale = get_format("nvfp4"), torch.tensor(1.0)
    found = errors(w, fmt, dscale, block_stat(w, fmt), FOUR_OVER_SIX)
    assert choose(found, FOUR_OVER_SIX).tolist() == [[1.0], [1.5]]
    assert found[0, 0, 0] == 0


def test_four_over_six_leaves_room_in_the_block_scale():
    w = weights(8, 64)
    fmt, largest = get_format("nvfp4"), amax(w) * FOUR_OVER_SIX_RANGE
    stat = 1.5 * block_stat(w, fmt)
    fields = encode(w, fmt, tensor_scale(largest, fmt), stat)
    assert fields["block_scale"].float().max() == 384


def test_multipliers_begin_with_one():
    assert MSE_MULTIPLIERS[0] == FOUR_OVER_SIX[0] == 1.0
    assert len(set(MSE_MULTIPLIERS)) == len(MSE_MULTIPLIERS)


@every_blocked_format
def test_blocks_of_zeros_keep_their_statistic(fmt):
    w = torch.zeros(2, 128)
    found = errors(w, fmt, torch.tensor(1.0), block_stat(w, fmt), MSE_MULTIPLIERS)
    assert not found.any() and (choose(found, MSE_MULTIPLIERS) == 1).all()


def test_the_earliest_of_equal_errors_is_chosen():
    found = torch.tensor([[5, 2, 1], [3, 2, 1], [3, 2, 0]])
    assert choose(found, (1.0, 0.9, 0.8)).tolist() == pytest.approx([0.9, 1.0, 0.8])


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e37])
def test_errors_of_extreme_weights_fit(scale):
    for fmt in ALL:
        w = weights(3, 128, dtype=torch.float32) * (scale / 0.6)
        found = errors(w, fmt, dscale_of(w, fmt), statistic(w, fmt), FEW)
        assert (found >= 0).all() and (found <= 3 * 128 * 2**33).all()


def test_pieces_that_cut_packed_elements_are_refused():
    with pytest.raises(FormatError, match="stores 8 columns together"):
        w, fmt = torch.ones(2, 32), get_format("int4")
        errors(w, fmt, None, block_stat(w, fmt, (0, 4)), FEW, SearchedPiece((0, 4)))


def test_empty_pieces_have_no_errors():
    for fmt in ALL:
        w = torch.empty(2, 0, 64)
        stat = block_stat(w, fmt) if fmt.stat_block else torch.ones(())
        assert not errors(w, fmt, scale_of(w, fmt), stat, FEW).any()


@every_dtype
def test_histograms_of_parts_add_up(dtype):
    x = weights(60, 700, dtype=dtype)
    limit = amax(x)
    whole = histogram(x, 64, limit)
    assert whole.dtype == torch.int64 and whole.sum() == x.numel()
    parts = histogram(x[:7], 64, limit) + histogram(x[7:].reshape(53, 7, 100), 64, limit)
    assert torch.equal(parts, whole)


def test_histogram_bins():
    x = torch.tensor([0.0, -0.0, 0.9, -1.0, 3.9, 4.0, 5.0, -torch.inf, torch.nan])
    assert histogram(x, 4, torch.tensor(4.0)).tolist() == [3, 1, 0, 5]
    assert histogram(torch.tensor(-3.0), 4, torch.tensor(4.0)).tolist() == [0, 0, 0, 1]
    assert histogram(torch.zeros(5), 4, torch.tensor(0.0)).tolist() == [5, 0, 0, 0]
    assert histogram(torch.empty(0, 3), 4, torch.tensor(1.0)).tolist() == [0, 0, 0, 0]


def test_percentile_is_the_least_edge_that_enough_values_do_not_exceed():
    counts, limit = torch.tensor([50, 30, 0, 19, 1]), torch.tensor(10.0)
    edges = {50: 2.0, 50.1: 4.0, 80: 4.0, 81: 8.0, 99: 8.0, 99.5: 10.0, 100: 10.0, 1e-9: 2.0}
    for q, edge in edges.items():
        assert percentile_amax(counts, limit, q).item() == edge, q


def test_percentile_of_several_and_of_nothing():
    counts = torch.tensor([[4, 0], [0, 4], [0, 0]])
    limits = torch.tensor([2.0, 3.0, 4.0])
    assert percentile_amax(counts, limits, 100).tolist() == [1.0, 3.0, 0.0]


def test_percentile_clips_outliers_of_real_values():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[0] = 30.0
    limit = amax(x)
    got = percentile_amax(histogram(x, 2048, limit), limit, 99.9)
    want = x.abs().kthvalue(99_900).values
    assert want <= got <= want + 30 / 2048


@every_blocked_format
def test_a_searched_statistic_is_layout_invariant_in_the_end(fmt):
    w = weights(ROWS, COLS)
    stat, dscale = statistic(w, fmt), dscale_of(w, fmt)
    best = stat * choose(errors(w, fmt, dscale, stat, FEW), FEW).unsqueeze(-1)
    whole = fake_quant(w, fmt, dscale, best)
    for box in pieces(fmt, 5):
        part = best[(..., *cells(fmt.stat_block, box), slice(None))]
        got = fake_quant(w[box], fmt, dscale, part, (box[0].start, box[1].start))
        assert same_bits(got, whole[box].contiguous())
