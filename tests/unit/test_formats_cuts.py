"""Pieces of a logical tensor equal the whole, so that every layout gives the same bytes."""

import pytest
import torch

from megatron_quant.formats import amax, block_stat, decode, encode, fake_quant, get_format
from megatron_quant.formats import tensor_scale as scale_from
from megatron_quant.formats.spec import CHANNEL
from tests.unit.formats_world import (
    COLS,
    ROWS,
    cells,
    every_blocked_format,
    every_dtype,
    every_format,
    pieces,
    same_bits,
    weights,
)


def of_box(whole, fmt, box):
    """The slices of the fields that belong to a box."""
    return {
        field.name: t[(..., *cells(field.block, box))] if t.dim() > 1 else t
        for field, t in zip(fmt.fields, whole.values(), strict=True)
    }


def check(w, fmt, boxes):
    """Each box of ``w`` [..., N, K] by itself gives the slice of what the whole gives."""
    dscale = scale_from(amax(w), fmt) if fmt.tensor_scale else None
    whole = encode(w, fmt, dscale)
    stat = block_stat(w, fmt) if fmt.stat_block else None
    decoded, quantized = decode(whole, fmt, w.dtype), fake_quant(w, fmt, dscale)
    assert same_bits(decoded, quantized)
    for box in boxes:
        piece, origin = w[(..., *box)], (box[0].start, box[1].start)
        merged = None if stat is None else stat[(..., *cells(fmt.stat_block, box), slice(None))]
        fields = encode(piece, fmt, dscale, merged, origin)
        want = of_box(whole, fmt, box)
        assert all(same_bits(fields[n], want[n]) for n in want), (origin, piece.shape)
        assert same_bits(decode(fields, fmt, w.dtype, origin), decoded[(..., *box)].contiguous())
        got = fake_quant(piece, fmt, dscale, merged, origin)
        assert same_bits(got, quantized[(..., *box)].contiguous())


@every_format
@every_dtype
@pytest.mark.parametrize("seed", range(2))
def test_encoding_commutes_with_any_cut(fmt, dtype, seed):
    check(weights(ROWS, COLS, dtype=dtype, seed=seed), fmt, pieces(fmt, seed))


@every_format
def test_encoding_a_stack_commutes_with_any_cut(fmt):
    check(weights(3, ROWS, COLS), fmt, pieces(fmt, 2))


@every_blocked_format
@every_dtype
@pytest.mark.parametrize("seed", range(3))
def test_statistics_of_pieces_merge_to_that_of_the_whole(fmt, dtype, seed):
    w = weights(2, ROWS, COLS, dtype=dtype, seed=seed)
    want = block_stat(w, fmt)
    merged = torch.zeros_like(want)
    for box in pieces(fmt, seed + 10):
        part = block_stat(w[(..., *box)], fmt, (box[0].start, box[1].start))
        place = merged[(..., *cells(fmt.stat_block, box), slice(None))]
        assert part.shape == place.shape and part.dtype == torch.float32
        torch.maximum(place, part, out=place)
    assert same_bits(merged, want)


@every_blocked_format
def test_the_statistic_is_the_largest_magnitude_or_both_ends(fmt):
    w = weights(ROWS, COLS)
    stat = block_stat(w, fmt)
    rows, cols = (slice(0, b or n) for b, n in zip(fmt.stat_block, w.shape, strict=True))
    block = w[rows, cols].float()
    want = [block.max(), -block.min()] if fmt.zero_point else [block.abs().max()]
    assert stat[0, 0].tolist() == [v.item() for v in want]
    assert stat.shape[:2] == fmt.field(fmt.fields[1].name).shape(ROWS, COLS)


def test_the_statistic_has_no_negative_ends():
    stat = block_stat(torch.full((1, 128), 3.0), get_format("int4_asym"))
    assert stat.tolist() == [[[3.0, 0.0]]] and not stat.signbit().any()


@every_blocked_format
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_the_statistic_propagates_what_is_not_finite(fmt, bad):
    w = torch.ones(2, 4, 256)
    w[1, 2, 3] = bad
    stat = block_stat(w, fmt)
    assert stat[0].isfinite().all() and not stat[1].isfinite().all()


@every_blocked_format
def test_the_statistic_of_nothing(fmt):
    one_block = fmt.stat_block[1] == 0
    assert block_stat(torch.empty(3, 0, 64), fmt, (7, 0)).shape[:2] == (3, 0)
    empty = block_stat(torch.empty(5, 0), fmt, (0, 24))
    assert empty.shape == (1 if fmt.name == "fp8_block" else 5, int(one_block), fmt.stat_parts)
    assert not empty.any()


def test_channels_ignore_the_column_origin():
    fmt, w = get_format("int4", CHANNEL), weights(4, 64)
    assert same_bits(block_stat(w, fmt, (0, 40)), block_stat(w, fmt))


def test_blocks_of_one_row_ignore_the_row_origin():
    fmt, w = get_format("nvfp4"), weights(4, 64)
    assert same_bits(block_stat(w, fmt, (3, 16)), block_stat(w, fmt))
