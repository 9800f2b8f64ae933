"""The loops in C give the bits of the torch codecs, whatever the input."""

import logging
import shutil
from collections.abc import Iterator
from math import prod

import pytest
import torch

from megatron_quant.formats import (
    FORMATS,
    amax,
    block_stat,
    encode,
    fake_quant,
    get_format,
    stack_amax,
    tensor_scale,
    with_signed_scales,
)
from megatron_quant.formats.backends.choose import loops_for
from megatron_quant.formats.spec import CHANNEL, regrouped
from megatron_quant.native import library

ALL = [
    *FORMATS.values(),
    *(get_format(n, g) for n in ("int4", "int4_asym", "int8_group") for g in (32, CHANNEL)),
    *(with_signed_scales(get_format("int4", g)) for g in (128, 32, CHANNEL)),
]
each_format = pytest.mark.parametrize(
    "fmt", ALL, ids=lambda f: f"{f.name}-{f.group_size}{'-signed' * f.signed}"
)


@pytest.fixture(autouse=True)
def _library_is_looked_for_anew() -> Iterator[None]:
    library._library.cache_clear()
    yield
    library._library.cache_clear()


@pytest.fixture
def both(monkeypatch):
    """Calls a function with the library and without, and returns both results."""
    monkeypatch.delenv("MEGATRON_QUANT_NATIVE", raising=False)
    if library._library() is None:
        if shutil.which("cc"):
            pytest.fail("the library is missing or stale: python setup.py build_ext --inplace")
        pytest.skip("no C compiler")

    def call(function, *args, **named):
        with_library = function(*args, **named)
        with monkeypatch.context() as without:
            without.setenv("MEGATRON_QUANT_NATIVE", "0")
            library._library.cache_clear()
            assert loops_for(torch.ones(1, dtype=torch.bfloat16)) is None
            in_torch = function(*args, **named)
        library._library.cache_clear()
        assert loops_for(torch.ones(1, dtype=torch.bfloat16)) is library
        return with_library, in_torch

    return call


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


def same_bits(pair):
    a, b = pair
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_bits((a[n], b[n])) for n in a)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def every_bf16():
    """Each finite bf16 once, in an order that mixes magnitudes, [N, 256]."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    return every[torch.randperm(every.numel(), generator=torch.Generator().manual_seed(1))][
        : every.numel() // 256 * 256
    ].view(-1, 256)


def ties():
    """Products of small integers and powers of two: quotients that lie between two codes."""
    halves = torch.arange(-64, 64) / 4.0
    scale = 2.0 ** torch.arange(-12, 12)
    return (halves.repeat(2) * scale[:, None]).to(torch.bfloat16)


def random(rows=40, cols=384, std=0.02):
    gen = torch.Generator().manual_seed(rows + cols)
    return (torch.randn(rows, cols, generator=gen) * std).to(torch.bfloat16)


def near_zero():
    """Signed zeros, subnormals, and blocks of nothing else."""
    x = torch.zeros(8, 256, dtype=torch.bfloat16)
    x[1] = -0.0
    x[2, ::2], x[2, 1::2] = 1e-40, -1e-40
    x[3] = random(1, 256, std=1e-38)
    x[4, 100] = 3e38
    x[5, ::16] = -1e-30
    x[6] = 3.38e38
    return x


INPUTS = {
    "random": random(),
    "every": every_bf16(),
    "ties": ties(),
    "near zero": near_zero(),
    "wide": (random(16, 256) * torch.logspace(-30, 30, 16)[:, None]).to(torch.bfloat16),
    "one block": random(1, 32),
}
each_input = pytest.mark.parametrize("x", INPUTS.values(), ids=list(INPUTS))


def scales(x, fmt):
    """The scale of the tensor and ones that do not fit it."""
    if not fmt.tensor_scale:
        return [None]
    own = tensor_scale(amax(x), fmt)
    return [own, own * 0.01, own * 100, torch.tensor(2.0**-126), torch.tensor(1e-45)]


@each_format
@each_input
def test_fields_and_fake_quant(both, fmt, x):
    for dscale in scales(x, fmt):
        assert same_bits(both(encode, x, fmt, dscale))
        assert same_bits(both(fake_quant, x, fmt, dscale))


@each_format
@each_input
def test_statistics(both, fmt, x):
    if fmt.stat_block:
        pair = both(block_stat, x, fmt)
        assert torch.equal(*pair) and pair[0].dtype == torch.float32
    assert same_bits(both(stack_amax, x.unsqueeze(0)))


@each_format
@pytest.mark.parametrize("origin", [(0, 0), (3, 8), (130, 200), (127, 376)])
@pytest.mark.parametrize("cols", [8, 120, 136, 1152])
def test_pieces_whose_blocks_are_cut(both, fmt, origin, cols):
    if not fmt.stat_block:
        return
    x = random(2 * 40, cols).view(2, 40, cols)
    pair = both(block_stat, x, fmt, origin)
    assert torch.equal(*pair)
    stat = pair[0] * 1.5
    dscale = tensor_scale(stack_amax(x), fmt) if fmt.tensor_scale else None
    assert same_bits(both(encode, x, fmt, dscale, stat, origin))
    assert same_bits(both(fake_quant, x, fmt, dscale, stat, origin))


@each_format
def test_rows_of_any_length_and_layout(both, fmt):
    for x in (random(1, 32)[0], random(3, 32 * 33), random(96, 64).T, random(5, 2080)[1:, 32:]):
        dscale = tensor_scale(amax(x), fmt) if fmt.tensor_scale else None
        assert same_bits(both(fake_quant, x, fmt, dscale))


@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "fp8_block", "int8", "int8_tensor"])
@pytest.mark.parametrize("origin", [(0, 0), (1, 5)])
def test_odd_columns_and_starts_between_words(both, name, origin):
    fmt = get_format(name)
    for cols in (1, 3, 17, 129, 1023, 1025, 2051):
        x = random(1, 3 * cols + 1)[0, 1:].view(3, cols)
        dscale = tensor_scale(amax(x), fmt) if fmt.tensor_scale else None
        assert same_bits(both(encode, x, fmt, dscale, None, origin))
        assert same_bits(both(fake_quant, x, fmt, dscale, None, origin))


@pytest.mark.parametrize("name", ["int4", "int4_asym", "int8_group"])
@pytest.mark.parametrize("group", [1, 7, 18, 33, 200])
def test_groups_of_any_size(both, name, group):
    fmt = regrouped(get_format(name), group)
    for origin in ((0, 0), (0, 8), (2, 1000)):
        x = random(3, 1096)
        assert same_bits(both(encode, x, fmt, None, None, origin))
        assert same_bits(both(fake_quant, x, fmt, None, None, origin))


@each_format
def test_every_value_with_scales_that_are_not_its_own(both, fmt):
    if not fmt.stat_block:
        return
    x, gen = every_bf16(), torch.Generator().manual_seed(2)
    dscale = torch.tensor(0.01) if fmt.tensor_scale else None
    stat = block_stat(x, fmt)
    for spread in (4, 120):
        given = torch.exp2(spread * (torch.rand(stat.shape, generator=gen) - 0.5))
        assert same_bits(both(encode, x, fmt, dscale, given))
        assert same_bits(both(fake_quant, x, fmt, dscale, given))


def test_fp8_with_scales_whose_inverse_serves_and_others(both):
    x, fmt = every_bf16(), get_format("fp8")
    amaxes = torch.cat([2.0 ** torch.arange(-20, 20, 7), random(1, 24, std=1.0)[0].float().abs()])
    for dscale in tensor_scale(amaxes, fmt):
        assert same_bits(both(encode, x, fmt, dscale))
        assert same_bits(both(fake_quant, x, fmt, dscale))


@each_format
def test_a_stack_with_a_scale_for_each_matrix(both, fmt):
    x = random(3 * 20, 256).view(3, 20, 256) * torch.tensor([1.0, 8.0, 0.1]).view(3, 1, 1)
    x = x.to(torch.bfloat16)
    dscale = tensor_scale(stack_amax(x), fmt) if fmt.tensor_scale else None
    assert same_bits(both(encode, x, fmt, dscale))
    assert same_bits(both(fake_quant, x, fmt, dscale))


@pytest.mark.parametrize("shape", [(1 << 16,), (257, 513), (3, 128, 512), (64, 1025)])
@pytest.mark.parametrize("value", [-3.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
def test_amax_of_a_whole_tensor(both, shape, value):
    x = random(1, prod(shape))[0].view(shape)
    for at in (0, x.numel() // 2, x.numel() - 1):
        one = x.clone()
        one.view(-1)[at] = value
        pair = both(amax, one)
        assert pair[0].shape == () and torch.equal(pair[0].nan_to_num(7.0), pair[1].nan_to_num(7.0))
        assert torch.equal(pair[0].isnan(), pair[1].isnan())
        assert torch.equal(*both(amax, x.mT if x.dim() > 1 else x[1:]))


@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "fp8_block", "nvfp4", "mxfp8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_same_results(both, name, value):
    fmt, x = get_format(name), random(4, 256)
    x[1, 37] = value
    x[2, 200] = -value
    a, b = both(fake_quant, x, fmt, torch.tensor(1e-3))
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if fmt.stat_block:
        a, b = both(block_stat, x, fmt)
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@each_format
def test_threads_share_the_rows(both, fmt, monkeypatch):
    monkeypatch.setattr(library, "_SHARE", 1 << 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        x = random(67, 512)
        dscale = tensor_scale(amax(x), fmt) if fmt.tensor_scale else None
        assert same_bits(both(encode, x, fmt, dscale))
        assert same_bits(both(fake_quant, x, fmt, dscale))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_run_in_torch(dtype):
    assert loops_for(torch.ones(2, 16, dtype=dtype)) is None
    assert loops_for(torch.empty(0, 16, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("found", ["nothing", "a stale build"])
def test_a_missing_library_is_a_note_and_no_more(found, monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("MEGATRON_QUANT_NATIVE", raising=False)
    if found == "nothing":
        monkeypatch.setattr(library, "_FILE", tmp_path / "absent.so")
    else:
        monkeypatch.setattr(library, "_VERSION", -1)
    fmt = get_format("nvfp4")
    with caplog.at_level(logging.DEBUG):
        fields = encode(random(4, 32), fmt, torch.tensor(1e-4))
    assert fields["elements"].shape == (4, 16)
    assert [r.levelno for r in caplog.records] == [logging.DEBUG]
