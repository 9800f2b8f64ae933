"""GPTQ on every grid, against its plain form, with results that it must never give."""

import pytest
import torch

from megatron_quant import formats
from megatron_quant.errors import CalibrationError, FormatError, RecipeError
from megatron_quant.formats import block_stat, decode, encode, get_format
from megatron_quant.formats.grid import encode_on
from megatron_quant.rounding import (
    GptqSettings,
    Piece,
    algorithm,
    default_damp,
    factored,
    gptq,
    gptq_pieces,
)
from tests.unit.formats_world import every_dtype, every_format, same_bits
from tests.unit.gptq_world import COLS, dscale_of, loss, moment, plain, rtn, scales_of, stack

INT4, NVFP4 = get_format("int4"), get_format("nvfp4")


@every_format
def test_it_is_gptq_as_published(fmt):
    w, h = stack(1, 20)[0], moment()
    _, scales = rtn(w, fmt)
    damp = default_damp(fmt)
    got, want = gptq(w, fmt, scales, h), plain(w, fmt, scales, h, damp)
    damped = h.double() + damp * h.diagonal().mean() * torch.eye(COLS)
    assert (got.w == want).float().mean() > 0.99  # ties of the last bit of fp32
    torch.testing.assert_close(loss(w, got.w, damped), loss(w, want, damped), rtol=1e-3, atol=0)
    torch.testing.assert_close(got.loss_E, loss(w, got.w, damped).view(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cols", [8, 40, 136, 200])
def test_columns_that_no_block_fills(cols):
    w, h = stack(1, 20, cols)[0], moment(cols=cols)
    _, scales = rtn(w, INT4)
    assert (gptq(w, INT4, scales, h).w == plain(w, INT4, scales, h, 0.01)).float().mean() > 0.99


@every_format
@every_dtype
def test_the_result_is_on_the_grid(fmt, dtype):
    w = stack(dtype=dtype)
    _, scales = rtn(w, fmt)
    got = gptq(w, fmt, scales, moment()).w
    fields = encode_on(got, fmt, scales)
    assert got.dtype == torch.float32 and got.shape == w.shape
    assert same_bits(decode(fields, fmt, torch.float32), got)
    assert list(fields) == [field.name for field in fmt.fields]


@pytest.mark.parametrize(
    "fmt", [f for f in formats.FORMATS.values() if f.inputs], ids=lambda f: f.name
)
def test_a_weight_in_bf16_keeps_its_codes(fmt):
    """Eight bits of a code would not survive a division in bf16."""
    w = stack(2, 256)
    dscale = dscale_of(w, fmt)
    scales = formats.scales_of(w, fmt, dscale)
    assert all(same_bits(scales[n], v) for n, v in rtn(w, fmt)[1].items())
    got = gptq(w, fmt, scales, moment()).w
    codes = encode_on(got, fmt, scales)[fmt.fields[0].name]
    kept = encode_on(got.bfloat16(), fmt, scales)[fmt.fields[0].name]
    assert same_bits(codes, kept)
    fake = formats.fake_quant_on(got.bfloat16(), fmt, scales)
    assert torch.equal(fake, decode(encode_on(got, fmt, scales), fmt, torch.bfloat16))


@every_format
def test_the_outputs_lose_far_less_than_by_rounding_to_nearest(fmt):
    w = torch.randn(3, 48, COLS, generator=torch.Generator().manual_seed(1)).bfloat16()
    h = torch.stack([moment(seed, spread=0.3) for seed in range(3)])
    nearest, scales = rtn(w, fmt)
    got = gptq(w, fmt, scales, h).w
    ratio = loss(w, got, h) / loss(w, nearest, h)
    assert (ratio < 0.5).all(), ratio  # seen: 0.31 to 0.46


@every_format
def test_scales_that_clip_do_no_harm(fmt):
    w = stack(1, 150)[0].float()
    stat = None if fmt.stat_block is None else 0.5 * block_stat(w, fmt)
    fields = encode(w, fmt, dscale_of(w, fmt) * 0.5 if fmt.tensor_scale else None, stat)
    nearest, h = decode(fields, fmt, torch.float32), moment()
    got = gptq(w, fmt, scales_of(fields, fmt), h).w
    assert got.isfinite().all() and loss(w, got, h) < 0.95 * loss(w, nearest, h)


@every_format
def test_a_row_comes_out_the_same_in_any_company(fmt, monkeypatch):
    w, h = stack(3, 150), torch.stack([moment(seed) for seed in range(3)])
    _, scales = rtn(w, fmt)
    whole = gptq(w, fmt, scales, h).w
    monkeypatch.setitem(algorithm._BYTES, "cpu", 1)  # a matrix at a time
    assert same_bits(gptq(w, fmt, scales, h).w, whole)
    for rows in (slice(0, 1), slice(1, 66), slice(66, 150)):
        part = {name: _rows_of(value, rows, fmt, name) for name, value in scales.items()}
        got = gptq(w[:, rows], fmt, part, h, GptqSettings(origin=(rows.start, 0))).w
        assert same_bits(got, whole[:, rows].contiguous())


def _rows_of(value, rows, fmt, name):
    block = fmt.field(name).block[0]
    return value[:, rows.start // block : -(-rows.stop // block)] if block else value


@every_format
def test_pieces_of_the_same_inputs_are_rounded_by_one_factor(fmt, monkeypatch):
    made = []
    real = algorithm.feedback
    monkeypatch.setattr(algorithm, "feedback", lambda *args: made.append(0) or real(*args))
    moments = torch.stack([moment(), moment().flip(0, 1)])
    parts = [(w, rtn(w, fmt)[1]) for w in (stack(), stack().flip(1))]
    found = gptq_pieces([Piece(*part) for part in parts], fmt, moments)
    assert len(made) == 1
    for (w, scales), got in zip(parts, found, strict=True):
        want = gptq(w, fmt, scales, moments)
        assert same_bits(got.w, want.w) and torch.equal(got.loss_E, want.loss_E)
    w, scales = stack()[:1], rtn(stack()[:1], fmt)[1]
    (alone,) = gptq_pieces([Piece(w, scales)], fmt, factored(moments[0], fmt))
    assert same_bits(alone.w, gptq(w, fmt, scales, moments[0]).w)


@every_format
def test_one_moment_for_a_stack_is_that_of_each(fmt):
    w, h = stack(), moment()
    _, scales = rtn(w, fmt)
    assert same_bits(gptq(w, fmt, scales, h).w, gptq(w, fmt, scales, h.expand(2, -1, -1)).w)


@every_format
def test_inputs_that_say_nothing_leave_the_nearest_values(fmt):
    w = stack(dtype=torch.float32)
    nearest, scales = rtn(w, fmt)
    for h in (torch.zeros(COLS, COLS), torch.eye(COLS)):
        assert torch.equal(gptq(w, fmt, scales, h).w, nearest)


def test_inputs_that_were_always_zero():
    w, h = stack(1, dtype=torch.float32)[0], moment()
    dead = torch.arange(COLS) % 5 == 0
    h[dead], h[:, dead] = 0, 0
    nearest, scales = rtn(w, NVFP4)
    got = gptq(w, NVFP4, scales, h).w
    assert torch.equal(got[:, dead], nearest[:, dead])
    assert (got == plain(w, NVFP4, scales, h, 0.05)).float().mean() > 0.99
    assert loss(w, got, h) < 0.6 * loss(w, nearest, h)


def test_fewer_tokens_than_columns():
    w, h = stack(1)[0], moment(tokens=9)
    nearest, scales = rtn(w, INT4)
    assert loss(w, gptq(w, INT4, scales, h).w, h) < 0.1 * loss(w, nearest, h)


def test_no_rows():
    w = stack(2, 0)
    _, scales = rtn(w, INT4)
    got = gptq(w, INT4, scales, moment())
    assert got.w.shape == (2, 0, COLS) and got.loss_E.tolist() == [0.0]


def test_the_damp_hardly_matters_within_its_usual_range():
    w, h = stack(1, 100)[0], moment(spread=0.3)
    _, scales = rtn(w, INT4)
    few, many = (
        loss(w, gptq(w, INT4, scales, h, GptqSettings(damp=damp)).w, h) for damp in (0.01, 0.05)
    )
    assert abs(many / few - 1) < 0.1


def test_a_larger_damp_is_taken_where_the_factor_fails():
    h = moment(tokens=20)  # of rank 20
    h = h - 0.3 * h.diagonal().mean() * torch.eye(COLS)
    h.diagonal().clamp_(min=0)
    w = stack(2)
    _, scales = rtn(w, INT4)
    got = gptq(w, INT4, scales, torch.stack([moment(), h]))
    assert got.damp_E.tolist() == [0.01, 1.0] and got.w.isfinite().all()


@pytest.mark.parametrize("damp", [0.0, -0.01, 1.5, float("nan"), float("inf")])
def test_a_damp_out_of_range(damp):
    w = stack()
    with pytest.raises(RecipeError, match=rf"damp is {damp}; .* 0\.01"):
        gptq(w, INT4, rtn(w, INT4)[1], moment(), GptqSettings(damp=damp))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_moment_that_is_not_finite(value):
    w, h = stack(), torch.stack([moment(), moment()])
    h[1, 3, 5] = value
    with pytest.raises(CalibrationError, match=r"inputs of up\.1 is not finite"):
        gptq(w, INT4, rtn(w, INT4)[1], h, GptqSettings(names=["up.0", "up.1"]))


def test_what_is_no_moment():
    w, h = stack(), moment()
    scales = rtn(w, INT4)[1]
    h[3, 3] = -1
    with pytest.raises(CalibrationError, match="inputs of matrix 0 has -1 on its diagonal"):
        gptq(w, INT4, scales, h)
    with pytest.raises(CalibrationError, match="o_proj is not positive definite, even with 100 of"):
        gptq(
            w,
            INT4,
            scales,
            torch.eye(COLS) - 1e4 * (1 - torch.eye(COLS)),
            GptqSettings(names=["o_proj"]),
        )


def test_what_cannot_be_rounded():
    w = stack()
    scales = rtn(w, INT4)[1]
    with pytest.raises(FormatError, match="starts at column 128"):
        gptq(w, INT4, scales, moment(), GptqSettings(origin=(0, 128)))
    with pytest.raises(FormatError, match="multiple of 8"):
        gptq(w[..., :252], INT4, scales, moment(cols=252))
    with pytest.raises(FormatError, match="float64"):
        gptq(w.double(), INT4, scales, moment())
