"""What makes layout invariance true, and the errors of the codec."""

import pytest
import torch

from megatron_quant.errors import FormatError
from megatron_quant.formats import (
    decode,
    encode,
    fake_quant,
    get_format,
    stack_amax,
    tensor_scale,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMATS = [
    get_format("fp8"),
    get_format("nvfp4"),
    get_format("int4"),
    get_format("int4", 32),
]


def scale_of(stack, fmt):
    return tensor_scale(stack_amax(stack), fmt) if fmt.tensor_scale else None


def bits(t):
    return t.contiguous().view(-1).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def weights(*shape, dtype=torch.bfloat16):
    gen = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=gen) * 0.02).to(dtype)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.group_size}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fields_have_the_promised_names_dtypes_and_shapes(fmt, dtype):
    w = weights(3, 6, 208, dtype=dtype)
    dscale = scale_of(w, fmt)
    stack, one = (
        encode(w, fmt, dscale),
        encode(w[1], fmt, None if dscale is None else dscale[1, 0, 0]),
    )
    assert list(stack) == list(one) == [f.name for f in fmt.fields]
    for field in fmt.fields:
        assert stack[field.name].dtype == one[field.name].dtype == field.dtype
        assert one[field.name].shape == field.shape(6, 208)
        assert same_bits(stack[field.name][1].view(one[field.name].shape), one[field.name])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.group_size}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_commutes_with_slicing(fmt, dtype):
    w = weights(1, 24, 336, dtype=dtype)  # int4's last group of 128 is short
    dscale = scale_of(w, fmt)
    dscale = None if dscale is None else dscale[0, 0, 0]
    whole, cut = encode(w[0], fmt, dscale), fmt.group_size or 16
    for rows, cols in ((slice(5, 17), slice(None)), (slice(None), slice(cut, 2 * cut)),
                       (slice(3, 4), slice(cut, None))):  # fmt: skip
        part = encode(w[0, rows, cols], fmt, dscale)
        for field in fmt.fields:
            want = whole[field.name]
            if want.dim():
                start, stop, _ = cols.indices(336)
                block = field.block[1]
                want = want[rows, start // block : -(-stop // block)]
            assert same_bits(part[field.name], want), field.name


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.group_size}")
def test_chunks_of_rows_leave_no_trace(fmt):
    w = weights(2, 600, 512)  # several chunks
    dscale = scale_of(w, fmt)
    whole = encode(w, fmt, dscale)
    part = encode(w[1:, 300:], fmt, None if dscale is None else dscale[1:])
    for field in fmt.fields:
        want = whole[field.name][1:]
        assert same_bits(part[field.name], want[:, 300:] if want.shape[1] > 1 else want)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.group_size}")
def test_decoding_is_close_and_stable(fmt):
    w = weights(2, 16, 256)
    dscale = scale_of(w, fmt)
    decoded = decode(encode(w, fmt, dscale), fmt, torch.float32)
    error = (decoded - w.float()).norm() / w.float().norm()
    assert error < {"fp8": 0.04, "nvfp4": 0.12, "int4": 0.13}[fmt.name]
    rounded = decode(encode(w, fmt, dscale), fmt, torch.bfloat16)
    assert same_bits(rounded, decoded.bfloat16())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.group_size}")
@pytest.mark.parametrize("largest", [1e-45, 1e-43, 1e-40, 1e-37, 3e38])
def test_extreme_magnitudes_decode_to_finite_values(fmt, largest):
    w = (torch.linspace(-1, 1, 256) * largest).view(1, 2, 128)
    fields = encode(w, fmt, scale_of(w, fmt))
    decoded = decode(fields, fmt, torch.float32)
    assert decoded.isfinite().all()
    assert (decoded.abs() <= 1.07 * largest).all()
    assert all(t.float().isfinite().all() for n, t in fields.items() if n != "elements")


@pytest.mark.parametrize("given", [1e-45, 2.0**-149 * 5, 1e-38, 1e30])
def test_a_scale_that_does_not_fit_saturates_or_vanishes_but_makes_no_nan(given):
    w = torch.tensor([[0.0, -0.0, 1e-45, -1e-40, 1.0, -1.0, 1e30, -1e30] * 4])
    for fmt in FORMATS[:2]:
        fields = encode(w, fmt, torch.tensor(given))
        assert decode(fields, fmt, torch.float32).isfinite().all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.group_size}")
def test_zero_weights_decode_to_zero(fmt):
    w = torch.zeros(1, 2, 128)
    fields = encode(w, fmt, scale_of(w, fmt))
    assert torch.equal(decode(fields, fmt, torch.float32), w)
    assert all((t.float() > 0).all() for n, t in fields.items() if "scale" in n)


def test_signed_zero():
    # As ModelOpt: a negative value that rounds to zero keeps its sign, a negative zero does not.
    w = torch.tensor([[6.0, -0.0, -0.1, 0.1] * 4])
    fields = encode(w, get_format("nvfp4"), torch.tensor(1.0))
    assert fields["elements"].tolist() == [[0x07, 0x08] * 4]


def test_empty_matrices():
    for fmt in FORMATS:
        fields = encode(torch.empty(2, 0, 64), fmt, torch.ones(2, 1, 1))
        assert decode(fields, fmt, torch.bfloat16).shape == (2, 0, 64)


def test_encoding_needs_no_contiguous_weight_and_makes_no_graph():
    w = weights(64, 32, dtype=torch.float32).requires_grad_()
    for fmt in FORMATS:
        fields, want = (encode(t, fmt, torch.tensor(1e-3)) for t in (w.T, w.T.contiguous()))
        assert all(same_bits(fields[n], want[n]) and not fields[n].requires_grad for n in want)


@pytest.mark.parametrize("function", [encode, fake_quant])
@pytest.mark.parametrize(("name", "cols", "multiple"), [("nvfp4", 24, 16), ("int4", 132, 8)])
def test_columns_that_cannot_be_stored(function, name, cols, multiple):
    with pytest.raises(FormatError, match=rf"multiple of {multiple}.*\[2, {cols}\].*exclude"):
        function(torch.ones(2, cols), get_format(name), torch.tensor(1.0))


@pytest.mark.parametrize("function", [encode, fake_quant])
def test_dtypes_that_cannot_be_stored(function):
    with pytest.raises(FormatError, match=r"float64.*cast"):
        function(torch.ones(2, 16, dtype=torch.float64), get_format("fp8"), torch.tensor(1.0))
