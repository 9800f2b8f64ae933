"""The promises of encoding for every format, and the errors of the codec."""

import pytest
import torch

from megatron_quant.errors import FormatError
from megatron_quant.formats import block_stat, decode, encode, fake_quant, get_format
from megatron_quant.formats.numbers.scales import e8m0_values
from tests.unit.formats_world import (
    ALL,
    BLOCKED,
    every_blocked_format,
    every_dtype,
    every_format,
    same_bits,
    scale_of,
    weights,
)


def scales(fields):
    """The scale fields as numbers."""
    found = {n: t for n, t in fields.items() if "scale" in n}
    return {n: e8m0_values(t) if t.dtype == torch.uint8 else t.float() for n, t in found.items()}


@every_format
@every_dtype
def test_fields_have_the_promised_names_dtypes_and_shapes(fmt, dtype):
    w = weights(3, 6, 224, dtype=dtype)
    dscale = scale_of(w, fmt)
    stack = encode(w, fmt, dscale)
    one = encode(w[1], fmt, None if dscale is None else dscale[1, 0, 0])
    assert list(stack) == list(one) == [f.name for f in fmt.fields]
    for field in fmt.fields:
        assert stack[field.name].dtype == one[field.name].dtype == field.dtype
        assert one[field.name].shape == field.shape(6, 224)
        assert same_bits(stack[field.name][1].view(one[field.name].shape), one[field.name])


@every_format
def test_a_stack_is_its_matrices(fmt):
    w = weights(3, 130, 160)
    dscale = scale_of(w, fmt)
    stack = encode(w, fmt, dscale)
    decoded = decode(stack, fmt, torch.float32)
    for e in range(3):
        one = encode(w[e], fmt, None if dscale is None else dscale[e, 0, 0])
        assert all(same_bits(stack[n][e].view(t.shape), t) for n, t in one.items())
        assert same_bits(decoded[e], decode(one, fmt, torch.float32))


@every_format
def test_chunks_of_rows_leave_no_trace(fmt):
    w = weights(2, 640, 512)  # several chunks
    dscale = scale_of(w, fmt)
    whole = encode(w, fmt, dscale)
    part = encode(w[1:, 256:], fmt, None if dscale is None else dscale[1:])
    for field in fmt.fields:
        want = whole[field.name][1:]
        rows = 256 // field.block[0] if want.shape[1] > 1 else 0
        assert same_bits(part[field.name], want[:, rows:])


@every_format
def test_decoding_is_close_and_rounds_once(fmt):
    w = weights(2, 16, 256)
    dscale = scale_of(w, fmt)
    decoded = decode(encode(w, fmt, dscale), fmt, torch.float32)
    error = (decoded - w.float()).norm() / w.float().norm()
    assert error < (0.22 if fmt.bits == 4 else 0.04)
    rounded = decode(encode(w, fmt, dscale), fmt, torch.bfloat16)
    assert same_bits(rounded, decoded.bfloat16())


@every_format
@pytest.mark.parametrize("largest", [1e-45, 1e-43, 1e-40, 1e-37, 3e38])
def test_extreme_magnitudes_decode_to_finite_values(fmt, largest):
    w = (torch.linspace(-1, 1, 256) * largest).view(1, 2, 128)
    fields = encode(w, fmt, scale_of(w, fmt))
    decoded = decode(fields, fmt, torch.float32)
    assert decoded.isfinite().all()
    assert (decoded.abs() <= 1.07 * largest).all()
    assert all((t > 0).all() and t.isfinite().all() for t in scales(fields).values())


@pytest.mark.parametrize("given", [1e-45, 2.0**-149 * 5, 1e-38, 1e30])
@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int8_tensor"])
def test_a_scale_that_does_not_fit_saturates_or_vanishes_but_makes_no_nan(given, name):
    w = torch.tensor([[0.0, -0.0, 1e-45, -1e-40, 1.0, -1.0, 1e30, -1e30] * 4])
    fields = encode(w, get_format(name), torch.tensor(given))
    assert decode(fields, get_format(name), torch.float32).isfinite().all()


@every_format
@every_dtype
def test_zero_weights_have_positive_scales_and_decode_to_zero(fmt, dtype):
    w = torch.zeros(1, 2, 128, dtype=dtype)
    w[0, 1, ::2] = -0.0
    fields = encode(w, fmt, scale_of(w, fmt))
    assert torch.equal(decode(fields, fmt, dtype), w)
    assert all((t > 0).all() and t.isfinite().all() for t in scales(fields).values())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_signed_zero_of_fp4(name):
    # As both tools: a negative value that rounds to zero keeps its sign, a negative zero does not.
    w = torch.tensor([[6.0, -0.0, -0.1, 0.1] * 8])
    fields = encode(w, get_format(name), torch.tensor(1.0))
    assert fields["elements"].tolist() == [[0x07, 0x08] * 8]


def test_an_int4_zero_point_uses_the_whole_range():
    w = torch.linspace(0, 15, 16).repeat(1, 8)
    fields = encode(w, get_format("int4_asym"), None)
    assert fields["zero"].tolist() == [[0]] and fields["scale"].tolist() == [[1.0]]
    assert torch.equal(decode(fields, get_format("int4_asym"), torch.float32), w)
    assert encode(-w, get_format("int4_asym"), None)["zero"].tolist() == [[15]]


def test_empty_matrices():
    for fmt in ALL:
        fields = encode(torch.empty(2, 0, 64), fmt, torch.ones(2, 1, 1))
        assert decode(fields, fmt, torch.bfloat16).shape == (2, 0, 64)
        fields = encode(torch.empty(0, 4, 64), fmt, torch.ones(0, 1, 1))
        assert decode(fields, fmt, torch.bfloat16).shape == (0, 4, 64)


def test_encoding_needs_no_contiguous_weight_and_makes_no_graph():
    w = weights(64, 32, dtype=torch.float32).requires_grad_()
    for fmt in ALL:
        fields, want = (encode(t, fmt, torch.tensor(1e-3)) for t in (w.T, w.T.contiguous()))
        assert all(same_bits(fields[n], want[n]) and not fields[n].requires_grad for n in want)


@every_blocked_format
def test_a_given_statistic_scales_the_block(fmt):
    w = weights(2, 32, 256)
    dscale = scale_of(w, fmt)
    doubled = encode(w, fmt, dscale, 2 * block_stat(w, fmt))
    assert same_bits(
        encode(w, fmt, dscale)["elements"],
        encode(w, fmt, dscale, block_stat(w, fmt))["elements"],
    )
    for name, scale in scales(encode(w, fmt, dscale)).items():
        if name != "tensor_scale":
            ratio = scales(doubled)[name] / scale
            assert ((ratio == 2) | (scale * 2 > 448) & (fmt.name == "nvfp4")).all()


@every_blocked_format
def test_a_statistic_of_another_grid_is_a_bug(fmt):
    w = weights(4, 256)
    with pytest.raises(AssertionError):
        encode(w, fmt, torch.tensor(1.0), torch.ones(4, 99, fmt.stat_parts))


@pytest.mark.parametrize("function", [encode, fake_quant])
@pytest.mark.parametrize(
    ("name", "cols", "multiple"),
    [("nvfp4", 24, 16), ("int4", 132, 8), ("int4_asym", 4, 8), ("int8_group", 130, 4),
     ("mxfp8", 48, 32), ("mxfp4", 16, 32)],
)  # fmt: skip
def test_columns_that_cannot_be_stored(function, name, cols, multiple):
    with pytest.raises(FormatError, match=rf"multiple of {multiple}.*\[2, {cols}\].*exclude"):
        function(torch.ones(2, cols), get_format(name), torch.tensor(1.0))


@pytest.mark.parametrize("function", [encode, fake_quant])
@pytest.mark.parametrize(
    ("name", "column", "packed"),
    [("nvfp4", 17, 2), ("mxfp4", 1, 2), ("int4", 12, 8), ("int4_asym", 4, 8), ("int8_group", 2, 4)],
)
def test_a_cut_through_packed_elements(function, name, column, packed):
    fmt, w = get_format(name), torch.ones(2, 32)
    stat = block_stat(w, fmt, (0, column))
    with pytest.raises(FormatError, match=rf"stores {packed} columns.*column {column} .*layout"):
        function(w, fmt, torch.tensor(1.0), stat, (0, column))


@pytest.mark.parametrize("fmt", [f for f in BLOCKED if f.name in ("nvfp4", "mxfp8", "mxfp4")])
def test_a_cut_block_needs_its_statistic(fmt):
    with pytest.raises(FormatError, match=f"stores {fmt.group_size} columns together"):
        encode(torch.ones(2, 64), fmt, torch.tensor(1.0), origin=(0, 8))


@pytest.mark.parametrize("function", [encode, fake_quant])
def test_dtypes_that_cannot_be_stored(function):
    with pytest.raises(FormatError, match=r"float64.*cast"):
        function(torch.ones(2, 16, dtype=torch.float64), get_format("fp8"), torch.tensor(1.0))
