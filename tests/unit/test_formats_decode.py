"""Decoding stored codes, and their error: the loops in C against the torch codecs.

Every code of every element, under every shape of scales that a checkpoint has.
"""

from math import isnan

import pytest
import torch

from megatron_quant.ckpt.read.packed_weight import with_scale_dtype
from megatron_quant.formats import decode
from megatron_quant.formats.codec import lost
from megatron_quant.formats.numbers.arithmetic import kernel_of
from megatron_quant.formats.spec import CHANNEL, get_format, regrouped, stored_format
from megatron_quant.native import library
from megatron_quant.native.sizes import WHOLE
from tests.unit.test_formats_native import (  # noqa: F401 (fixtures)
    ALL,
    _library_is_looked_for_anew,
    both,
    same_bits,
)

READ = [
    *ALL,
    *(stored_format("int8_asym", g) for g in (32, 128, CHANNEL)),
    *(with_scale_dtype(get_format("int4"), d) for d in (torch.float16, torch.float32)),
    regrouped(get_format("int4_asym"), 1),
]
each_format = pytest.mark.parametrize(
    "fmt", READ, ids=lambda f: f"{f.name}-{f.group_size}-{f.fields[1].dtype}"
)
PIECE = 1024  # of a row, in csrc/pieces.h


def generator(*numbers):
    return torch.Generator().manual_seed(sum(numbers))


def elements(fmt, rows, cols, finite=True):
    """Every byte there is, over and over, in another order in each row."""
    field, packed = fmt.fields[0], kernel_of(fmt).element.packed
    in_row = cols // packed * field.dtype.itemsize
    count = rows * in_row
    every = torch.arange(256, dtype=torch.uint8).repeat(-(-count // 256))[:count]
    every = every[torch.randperm(count, generator=generator(rows, cols))]
    if finite and field.dtype == torch.float8_e4m3fn:
        every[(every & 127) == 127] = 126
    return every.view(rows, in_row).view(field.dtype)


def scale_of(field, shape):
    gen = generator(*shape)
    if field.dtype == torch.uint8 and field.name == "zero":
        return torch.randint(0, 16, shape, generator=gen).to(torch.uint8)
    if field.dtype == torch.uint8:
        return torch.randint(100, 140, shape, generator=gen).to(torch.uint8)
    if field.dtype == torch.float8_e4m3fn:
        codes = torch.randint(1, 127, shape, generator=gen).to(torch.uint8)
        return codes.view(torch.float8_e4m3fn)
    return (torch.rand(shape, generator=gen) * 0.1 + 1e-3).to(field.dtype)


def fields_of(fmt, rows, cols, origin=(0, 0), finite=True):
    """Of a piece at ``origin``: every block that it touches has scales."""
    found = {fmt.fields[0].name: elements(fmt, rows, cols, finite)}
    for field in fmt.fields[1:]:
        spans = zip(field.block, (rows, cols), origin, strict=True)
        shape = tuple(-(-(o % b + n) // b) if b else 1 for b, n, o in spans)
        found[field.name] = scale_of(field, shape if field.block != (WHOLE, WHOLE) else ())
    return found


@each_format
@pytest.mark.parametrize("cols", [32, 288, PIECE + 128])
def test_every_code(both, fmt, cols):  # noqa: F811
    fields = fields_of(fmt, 33, cols, finite=False)
    in_c, in_torch = both(decode, fields, fmt, torch.float32)
    assert in_c.shape == (33, cols) and same_bits((in_c, in_torch))


@each_format
@pytest.mark.parametrize("origin", [(0, 0), (3, 8), (130, 200), (127, 376)])
@pytest.mark.parametrize("cols", [8, 136, 1152])
def test_blocks_that_are_cut(both, fmt, origin, cols):  # noqa: F811
    fields = fields_of(fmt, 20, cols, origin)
    assert same_bits(both(decode, fields, fmt, torch.float32, origin))
    assert same_bits(both(decode, fields, fmt, torch.bfloat16, origin))


@pytest.mark.parametrize("step", [0.0, 1e-45, 2.0**-126, 1e-38, 3e38, torch.inf])
@pytest.mark.parametrize("name", ["fp8", "int8_tensor"])
def test_steps_at_the_ends_of_fp32(both, name, step):  # noqa: F811
    fmt = get_format(name)
    fields = fields_of(fmt, 4, 256) | {"scale": torch.tensor(step)}
    a, b = both(decode, fields, fmt, torch.float32)
    assert torch.equal(a.isnan(), b.isnan()) and same_bits((a.nan_to_num(7), b.nan_to_num(7)))


def test_every_pair_of_nvfp4_scales(both):  # noqa: F811
    fmt = get_format("nvfp4")
    scale = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    fields = fields_of(fmt, 1, 256 * 16) | {"block_scale": scale}
    a, b = both(decode, fields, fmt, torch.float32)
    assert torch.equal(a.isnan(), b.isnan()) and same_bits((a.nan_to_num(7), b.nan_to_num(7)))


def weights(decoded, dtype):
    """Values near what they decode to, as a checkpoint's are."""
    noise = torch.randn(decoded.shape, generator=generator(*decoded.shape))
    return (decoded * (1 + 0.05 * noise)).to(dtype)


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("cols", "origin"), [(32, (0, 0)), (PIECE + 136, (130, 200))])
def test_what_is_lost(both, fmt, dtype, cols, origin):  # noqa: F811
    fields = fields_of(fmt, 21, cols, origin)
    decoded = decode(fields, fmt, torch.float32, origin)
    w = weights(decoded.clamp(-6e4, 6e4), dtype)
    exact = [t.double().square().sum().item() for t in (w, w.float() - decoded)]
    for found in both(lost, w, fields, fmt, origin):
        assert found == pytest.approx(exact, rel=1e-12)


def test_what_is_lost_neither_overflows_nor_vanishes(both):  # noqa: F811
    fmt = get_format("fp8")
    for size in (1e30, 1e-30):
        fields = fields_of(fmt, 2, 64) | {"scale": torch.tensor(size)}
        w = weights(decode(fields, fmt, torch.float32), torch.bfloat16)
        for own, difference in both(lost, w, fields, fmt):
            assert 0 < difference / own < 0.01


@pytest.mark.parametrize("where", ["an element", "a value", "a scale"])
def test_nan_is_lost_beyond_all_bounds(both, where):  # noqa: F811
    fmt = get_format("fp8_channel")
    fields = fields_of(fmt, 8, 96)
    w = weights(decode(fields, fmt, torch.float32), torch.bfloat16)
    if where == "an element":
        fields["elements"].view(torch.uint8)[3, 95] = 255
    else:
        (w if where == "a value" else fields["scale"])[3, -1] = torch.nan
    assert all(isnan(difference) for _, difference in both(lost, w, fields, fmt))


def test_threads_share_the_rows(both, monkeypatch):  # noqa: F811
    monkeypatch.setattr(library, "_SHARE", 1 << 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for fmt in (get_format("nvfp4"), get_format("fp8_block"), get_format("int8")):
            fields = fields_of(fmt, 67, 512)
            decoded = decode(fields, fmt, torch.float32)
            assert same_bits(both(decode, fields, fmt, torch.float32))
            w = weights(decoded, torch.bfloat16)
            in_c, in_torch = both(lost, w, fields, fmt)
            assert in_c == pytest.approx(in_torch, rel=1e-12)
            torch.set_num_threads(1)
            assert lost(w, fields, fmt) == pytest.approx(in_c, rel=1e-12)
            torch.set_num_threads(3)
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_decoded_of_nothing():
    fmt = get_format("fp8_channel")
    fields = {"elements": torch.empty(0, 16, dtype=torch.float8_e4m3fn), "scale": torch.ones(0, 1)}
    assert decode(fields, fmt, torch.float32).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 17, 4096, 10001])
def test_same_numbers(both, dtype, count):  # noqa: F811
    a = torch.randn(count, generator=generator(count)).to(dtype)
    a[::7] = torch.inf
    a[::5] = -torch.inf
    assert both(library.same, a, a.clone()) == (True, False)
    for at in {0, count // 2, count - 1} if count else ():
        for value in (0.5, torch.nan):
            b = a.clone()
            b[at] = value
            assert not library.same(a, b)
            assert not library.same(b, b.clone()) or value == 0.5


def test_what_is_never_taken_for_the_same():
    a = torch.zeros(2, 3, dtype=torch.bfloat16)
    for b in (-a, a.half(), a.float(), a.view(3, 2), a.t(), a[:1], a.view(torch.int16)):
        assert not library.same(a, b) and not library.same(b, a)
    assert not library.same(a.view(torch.int16), a.view(torch.int16))
    assert not library.same(a.t(), a.t())
