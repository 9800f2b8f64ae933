"""Searches of scales in which an error counts by its input."""

import pytest
import torch

from megatron_quant.errors import CalibrationError
from megatron_quant.formats import amax, block_stat, decode, encode, get_format, tensor_scale
from megatron_quant.formats.search import MSE_MULTIPLIERS, SearchedPiece, choose, errors
from megatron_quant.rounding import gptq, importance
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
    weights,
)
from tests.unit.gptq_world import dscale_of, loss, moment, scales_of

FEW = (1.0, 0.8, 0.65, 1.3)
SEARCHED = [f for f in ALL if f.name not in ("mxfp4", "mxfp8")]


def statistic(w, fmt):
    return block_stat(w, fmt) if fmt.stat_block else amax(w)


def searched(w, fmt, weight):
    """Fields with the scales that the search finds, of one matrix."""
    stat, dscale = statistic(w, fmt), dscale_of(w, fmt) if fmt.stat_block else None
    chosen = choose(
        errors(w, fmt, dscale, stat, MSE_MULTIPLIERS, SearchedPiece(weight=weight)), MSE_MULTIPLIERS
    )
    if fmt.stat_block:
        return encode(w, fmt, dscale, stat * chosen.unsqueeze(-1))
    return encode(w, fmt, tensor_scale(stat * chosen, fmt))


@every_format
@every_dtype
def test_errors_are_weighted_squares(fmt, dtype):
    w = weights(2, 150, 160, dtype=dtype)
    weight = torch.rand(2, 160, generator=torch.Generator().manual_seed(0))
    stat, dscale = statistic(w, fmt), dscale_of(w, fmt) if fmt.stat_block else None
    got = errors(w, fmt, dscale, stat, [0.8], SearchedPiece(weight=weight))[0]
    given = (dscale, 0.8 * stat) if fmt.stat_block else (tensor_scale(0.8 * stat, fmt), None)
    fields = encode(w, fmt, *given)
    error = (w.float() - decode(fields, fmt, torch.float32)).double().square() * weight[:, None]
    unit = torch.frexp(stat.amax(-1) if fmt.stat_block else stat).exponent.exp2().double().square()
    if fmt.stat_block is None:
        want = error.sum()
    else:
        rows, cols = (b or n for b, n in zip(fmt.stat_block, w.shape[1:], strict=True))
        padded = torch.nn.functional.pad(error, (0, -160 % cols, 0, -150 % rows))
        want = padded.unflatten(2, (-1, cols)).unflatten(1, (-1, rows)).sum((2, 4))
    one = 2.0**-32 * unit  # what errors are counted in, each to the nearest
    assert ((got * one - want).abs() <= 1e-4 * want + 0.5 * one * error.numel()).all()


@every_format
def test_equal_weights_change_nothing(fmt):
    w = weights(2, 40, 160)
    stat, dscale = statistic(w, fmt), dscale_of(w, fmt) if fmt.stat_block else None
    plain = errors(w, fmt, dscale, stat, FEW)
    for ones in (torch.ones(160), torch.ones(2, 160)):
        assert torch.equal(errors(w, fmt, dscale, stat, FEW, SearchedPiece(weight=ones)), plain)
    halves = importance(torch.zeros(160), fmt)
    assert (halves == 0.5).all()
    assert torch.equal(
        choose(errors(w, fmt, dscale, stat, FEW, SearchedPiece(weight=halves)), FEW),
        choose(plain, FEW),
    )


@every_blocked_format
def test_weighted_errors_of_pieces_add_up_to_those_of_the_whole(fmt):
    w = weights(2, ROWS, COLS)
    weight = importance(torch.rand(2, COLS, generator=torch.Generator().manual_seed(0)), fmt)
    stat, dscale = statistic(w, fmt), dscale_of(w, fmt)
    whole = errors(w, fmt, dscale, stat, FEW, SearchedPiece(weight=weight))
    merged = torch.zeros_like(whole)
    for box in pieces(fmt, 4):
        touched = cells(fmt.stat_block, box)
        origin = (box[0].start, box[1].start)
        part = stat[(..., *touched, slice(None))]
        own = weight[:, box[1]]
        merged[(..., *touched)] += errors(
            w[(..., *box)], fmt, dscale, part, FEW, SearchedPiece(origin, own)
        )
    assert torch.equal(merged, whole)


@pytest.mark.parametrize("fmt", SEARCHED, ids=label)
def test_outputs_lose_less_than_by_a_search_that_knows_no_inputs(fmt):
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    h = moment()
    weight = importance(h.diagonal(), fmt)
    unweighted, weighted = (searched(w, fmt, known) for known in (None, weight))
    before, after = (
        loss(w, decode(fields, fmt, torch.float32), h) for fields in (unweighted, weighted)
    )
    assert after < 0.95 * before if fmt.stat_block else after <= before
    then = gptq(w, fmt, scales_of(weighted, fmt), h).w
    assert loss(w, then, h) < 0.65 * after


def test_weights_of_a_block_reach_a_half_and_keep_their_ratios():
    diagonal = torch.arange(64).float() ** 3
    got = importance(diagonal, get_format("nvfp4"))
    raised = (diagonal + 0.01 * diagonal.mean()).view(4, 16)
    ratio = raised / got.view(4, 16)
    assert torch.equal(ratio, ratio[:, :1].expand(-1, 16))
    assert ((got.view(4, 16).amax(1) >= 0.5) & (got.view(4, 16).amax(1) < 1)).all()
    assert (got > 0).all()


@every_format
def test_weights_of_a_stack_are_those_of_each(fmt):
    diagonal = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) * 1e9
    diagonal[1] = 0
    each = torch.stack([importance(row, fmt) for row in diagonal])
    assert same_bits(importance(diagonal, fmt), each)


def test_squares_that_are_not_finite():
    with pytest.raises(CalibrationError, match="inputs of q_proj are not finite"):
        importance(torch.tensor([1.0, torch.inf]), get_format("fp8"), "q_proj")
