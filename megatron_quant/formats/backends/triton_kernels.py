"""The codecs' inner loops in Triton, for CUDA: the arithmetic of csrc/, operation by operation.

Results are those of the torch code, bit for bit: a quotient is rounded once (``div_rn``), products
and sums are neither contracted (launch with ``enable_fp_fusion=False``) nor flushed, and elements
are rounded on their bit patterns, not by instructions that differ between devices.

A program works on T consecutive blocks, a row's last one followed by the next row's first, and of
each on C columns. ``x`` is contiguous [R, cols]; a row is cut into ``per_row`` blocks of ``block``
columns, ``first`` of the first one before column 0; ``total`` is R * per_row. Steps (and zero
points) are fp32, one a block, ``stride`` from a row to the next.
"""

import triton
import triton.language as tl

from megatron_quant.native import CElement

E4M3 = tl.constexpr(int(CElement.E4M3))
E4M3_BY_BF16 = tl.constexpr(int(CElement.E4M3_BY_BF16))
E2M1 = tl.constexpr(int(CElement.E2M1))
E2M1_BY_BF16 = tl.constexpr(int(CElement.E2M1_BY_BF16))
INT4_ZERO_BY_BF16 = tl.constexpr(int(CElement.INT4_ZERO_BY_BF16))
INT8 = tl.constexpr(int(CElement.INT8))
UINT8_BY_BF16 = tl.constexpr(int(CElement.UINT8_BY_BF16))

SIGN = tl.constexpr(0x80000000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITE = tl.constexpr(0x7F800000)
QUIET_NAN = tl.constexpr(0x7FC00000)
# One ulp of an fp32 in [2^23, 2^24) is 1: adding this rounds to an integer, ties to even.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(u):
    return u.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    u = bits_of(x)
    return (u + 0x7FFF + ((u >> 16) & 1)) >> 16


@triton.jit
def to_bf16(x):
    return float_of(bf16_bits(x) << 16)


@triton.jit
def nan_mask(q):
    return tl.where((bits_of(q) & MAGNITUDE) > INFINITE, 0xFFFFFFFF, 0).to(tl.uint32)


@triton.jit
def exponent_of(limited, SMALLEST: tl.constexpr):
    """Return the bits of the power of two below a float, at least SMALLEST's.

    limited: the float's bits.
    """
    return tl.maximum(limited, SMALLEST) & INFINITE


@triton.jit
def rounded(limited, exponent, FRACTION: tl.constexpr):
    """Return the sum that rounds to FRACTION bits, and the amount to take off (csrc/elements.h)."""
    big = float_of(exponent + ((23 - FRACTION) << 23))
    return float_of(limited) + big, big


@triton.jit
def rounded_e4m3(q):
    limited = tl.minimum(bits_of(q) & MAGNITUDE, 0x43E00000)  # 448
    exponent = exponent_of(limited, 0x3C800000)  # 2^-6
    total, big = rounded(limited, exponent, 3)
    return exponent, total, big


@triton.jit
def rounded_e2m1(q):
    limited = tl.minimum(bits_of(q) & MAGNITUDE, 0x40C00000)  # 6
    exponent = exponent_of(limited, 0x3F800000)  # 1
    total, big = rounded(limited, exponent, 1)
    return exponent, total, big


@triton.jit
def e4m3_code(q):
    exponent, total, _ = rounded_e4m3(q)
    code = bits_of(total) + (exponent >> 20) - (121 << 3)
    return ((code | nan_mask(q)) & 0x7F) | ((bits_of(q) & SIGN) >> 24)


@triton.jit
def e4m3_value(q):
    _, total, big = rounded_e4m3(q)
    return float_of(bits_of(total - big) | (bits_of(q) & SIGN) | (nan_mask(q) & QUIET_NAN))


@triton.jit
def e2m1_code(q):
    exponent, total, _ = rounded_e2m1(q)
    code = bits_of(total) + (exponent >> 22) - (127 << 1)
    return (code & 7) | tl.where(q < 0, 8, 0).to(tl.uint32)


@triton.jit
def e2m1_value(q):
    _, total, big = rounded_e2m1(q)
    return float_of(bits_of(total - big) | tl.where(q < 0, SIGN, 0).to(tl.uint32))


@triton.jit
def rounded_integer(q, HALF: tl.constexpr, HALF_BITS: tl.constexpr):
    """Return ROUND + q, q rounded to an integer in [-HALF, HALF)."""
    limited = tl.minimum(bits_of(q) & MAGNITUDE, HALF_BITS) | (bits_of(q) & SIGN)
    return float_of(tl.minimum(bits_of(float_of(limited) + ROUND), ROUND_BITS + (HALF - 1)))


@triton.jit
def rounded_int4(q):
    return rounded_integer(q, 8, 0x41000000)


@triton.jit
def rounded_int8(q):
    return rounded_integer(q, 128, 0x43000000)


@triton.jit
def quotient(x, step, zero, ELEMENT: tl.constexpr):
    # A step of 0 is a product of scales too small for fp32: any divisor but 0 will do.
    q = tl.div_rn(x, tl.where(bits_of(step) == 0, 1.0, step) + tl.zeros_like(x))
    if ELEMENT == INT4_ZERO_BY_BF16:
        q = to_bf16(to_bf16(q) + zero)
    elif ELEMENT != E4M3 and ELEMENT != E2M1 and ELEMENT != INT8:
        q = to_bf16(q)
    return q


@triton.jit
def code_of(q, ELEMENT: tl.constexpr):
    if ELEMENT == E4M3 or ELEMENT == E4M3_BY_BF16:
        code = e4m3_code(q)
    elif ELEMENT == E2M1 or ELEMENT == E2M1_BY_BF16:
        code = e2m1_code(q)
    elif ELEMENT == INT8:
        code = bits_of(rounded_int8(q)) & 0xFF
    elif ELEMENT == UINT8_BY_BF16:
        code = (bits_of(rounded_int8(q)) + 128) & 0xFF
    else:
        code = (bits_of(rounded_int4(q)) + 8) & 15
    return code.to(tl.uint8)


@triton.jit
def value_of(q, zero, ELEMENT: tl.constexpr):
    if ELEMENT == E4M3 or ELEMENT == E4M3_BY_BF16:
        value = e4m3_value(q)
    elif ELEMENT == E2M1 or ELEMENT == E2M1_BY_BF16:
        value = e2m1_value(q)
    elif ELEMENT == INT8 or ELEMENT == UINT8_BY_BF16:
        value = rounded_int8(q) - ROUND
    elif ELEMENT == INT4_ZERO_BY_BF16:
        value = rounded_int4(q) - ROUND - zero
    else:
        value = rounded_int4(q) - ROUND
    return value


@triton.jit
def blocks_of(cols, block, first, per_row, total, T: tl.constexpr):
    """Return this program's blocks: number, whether each exists, row, and column of its start."""
    number = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    row = number // per_row
    return number, number < total, row, (number - row * per_row) * block - first


@triton.jit
def columns_of(start, there, start_in_block, cols, block, C: tl.constexpr):
    """Return the columns [T, C] of blocks, and which of them exist."""
    offset = start_in_block + tl.arange(0, C)
    col = start[:, None] + offset[None, :]
    return col, there[:, None] & (offset < block)[None, :] & (col >= 0) & (col < cols)


@triton.jit
def scales_of(step, zero, at, there, ELEMENT: tl.constexpr):
    """Load steps and zero points of blocks, [T, 1]; the steps twice where there are no zeros."""
    steps = tl.load(step + at, mask=there, other=1.0)[:, None]
    zeros = steps
    if ELEMENT == INT4_ZERO_BY_BF16:
        zeros = tl.load(zero + at, mask=there, other=0.0)[:, None]
    return steps, zeros


@triton.jit
def bf16_values(x_bits):
    return float_of((x_bits.to(tl.uint32) & 0xFFFF) << 16)


@triton.jit
def store_codes(out, code, row, start, start_in_block, there, cols, block, PACKED: tl.constexpr,
                T: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Store codes of columns, PACKED to a byte, the even one in the low half: no cut splits one."""
    if PACKED == 2:
        low, high = tl.split(tl.reshape(code, (T, C // 2, 2)))
        code = low | (high << 4)
    cols, block, start = cols // PACKED, block // PACKED, start // PACKED
    col, mask = columns_of(start, there, start_in_block // PACKED, cols, block, C // PACKED)
    tl.store(out + row[:, None] * cols + col, code, mask=mask)


@triton.jit
def amax_kernel(x, out, cols, block, first, per_row, total, T: tl.constexpr, C: tl.constexpr):
    """Store max |x| of each block. Magnitudes order like their bits; a NaN wins.

    x: bf16 as int16. out: fp32, one a block.
    """
    number, there, row, start = blocks_of(cols, block, first, per_row, total, T)
    most = tl.zeros((T,), tl.int32)
    for at in range(0, block, C):
        col, mask = columns_of(start, there, at, cols, block, C)
        bits = tl.load(x + row[:, None] * cols + col, mask=mask, other=0).to(tl.int32)
        most = tl.maximum(most, tl.max(bits & 0x7FFF, axis=1))
    tl.store(out + number, float_of(most << 16), mask=there)


@triton.jit
def ends_kernel(x, out, cols, block, first, per_row, total, T: tl.constexpr, C: tl.constexpr):
    """Store max(x, 0) and max(-x, 0) of each block. x: bf16 as int16. out: fp32."""
    number, there, row, start = blocks_of(cols, block, first, per_row, total, T)
    high, low = tl.zeros((T,), tl.int32), tl.zeros((T,), tl.int32)
    for at in range(0, block, C):
        col, mask = columns_of(start, there, at, cols, block, C)
        up = tl.load(x + row[:, None] * cols + col, mask=mask, other=0)
        # Seen as signed integers, all values of the other sign are less than 0.
        high = tl.maximum(high, tl.max(up.to(tl.int32), axis=1))
        low = tl.maximum(low, tl.max((up ^ -32768).to(tl.int32), axis=1))
    tl.store(out + 2 * number, float_of(high << 16), mask=there)
    tl.store(out + 2 * number + 1, float_of(low << 16), mask=there)


@triton.jit
def encode_kernel(x, step, zero, out, cols, block, first, per_row, total, stride,
                  ELEMENT: tl.constexpr, PACKED: tl.constexpr,
                  T: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Store the elements of x / step. x: bf16 as int16. out: bytes, of PACKED elements each."""
    number, there, row, start = blocks_of(cols, block, first, per_row, total, T)
    scale = row * stride + (number - row * per_row)
    steps, zeros = scales_of(step, zero, scale, there, ELEMENT)
    at = tl.program_id(1) * C
    col, mask = columns_of(start, there, at, cols, block, C)
    values = bf16_values(tl.load(x + row[:, None] * cols + col, mask=mask, other=0))
    code = code_of(quotient(values, steps, zeros, ELEMENT), ELEMENT)
    store_codes(out, code, row, start, at, there, cols, block, PACKED, T, C)


@triton.jit
def fake_quant_kernel(x, step, zero, out, cols, block, first, per_row, total, stride,
                      ELEMENT: tl.constexpr, T: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Store (element - zero) * step in ``out``. x, out: bf16 as int16."""
    number, there, row, start = blocks_of(cols, block, first, per_row, total, T)
    scale = row * stride + (number - row * per_row)
    steps, zeros = scales_of(step, zero, scale, there, ELEMENT)
    col, mask = columns_of(start, there, tl.program_id(1) * C, cols, block, C)
    at = row[:, None] * cols + col
    values = bf16_values(tl.load(x + at, mask=mask, other=0))
    value = value_of(quotient(values, steps, zeros, ELEMENT), zeros, ELEMENT)
    tl.store(out + at, bf16_bits(value * steps).to(tl.int16), mask=mask)


@triton.jit
def nvfp4_scale(values, dscale):
    """Return amax / (6 * dscale) of blocks [T, 16], held within E4M3's range: [T]."""
    amax = float_of(tl.max((bits_of(values) & MAGNITUDE).to(tl.int32), axis=1))
    exact = tl.div_rn(amax, 6.0 * dscale)
    exact = bits_of(tl.where(exact == 0, 1.0, exact))
    most = tl.where(exact > INFINITE, exact, 0x43E00000)  # 448; a NaN stays one
    return float_of(tl.maximum(tl.minimum(exact, most.to(tl.uint32)), 0x3B000000))  # 2^-9


@triton.jit
def nvfp4_encode_kernel(x, dscale, scale, out, cols, block, first, per_row, total, stride,
                        T: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Store scales and elements. C is 16.

    x: bf16 as int16. dscale: one a row. scale, out: bytes.
    """
    number, there, row, start = blocks_of(cols, block, first, per_row, total, T)
    col, mask = columns_of(start, there, 0, cols, block, C)
    values = bf16_values(tl.load(x + row[:, None] * cols + col, mask=mask, other=0))
    whole = tl.load(dscale + row * stride, mask=there, other=1.0)
    exact = nvfp4_scale(values, whole)
    tl.store(scale + number, e4m3_code(exact).to(tl.uint8), mask=there)
    steps = (e4m3_value(exact) * whole)[:, None]
    code = code_of(quotient(values, steps, steps, E2M1), E2M1)
    store_codes(out, code, row, start, 0, there, cols, block, 2, T, C)


@triton.jit
def nvfp4_fake_quant_kernel(x, dscale, out, cols, block, first, per_row, total, stride,
                            T: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Store the decoded values. x, out: bf16 as int16. dscale: one a row. C is 16."""
    _, there, row, start = blocks_of(cols, block, first, per_row, total, T)
    col, mask = columns_of(start, there, 0, cols, block, C)
    at = row[:, None] * cols + col
    values = bf16_values(tl.load(x + at, mask=mask, other=0))
    whole = tl.load(dscale + row * stride, mask=there, other=1.0)
    steps = (e4m3_value(nvfp4_scale(values, whole)) * whole)[:, None]
    value = e2m1_value(quotient(values, steps, steps, E2M1))
    tl.store(out + at, bf16_bits(value * steps).to(tl.int16), mask=mask)
