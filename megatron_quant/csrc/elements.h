/* Rounding of one quotient (value / step) to an element: its code, or the value of that code.
   To nearest, ties to even, saturating, as formats/elements.py. What a NaN becomes is arbitrary,
   but for E4M3, which has one.

   Limits are applied to bit patterns, which order like the magnitudes they stand for: an integer
   minimum is one instruction to every compiler, one of floats is a branch to some. */
#ifndef MEGATRON_QUANT_ELEMENTS_H
#define MEGATRON_QUANT_ELEMENTS_H

#include "common.h"

#define SIGN 0x80000000u
#define INFINITE 0x7f800000
#define QUIET_NAN 0x7fc00000

/* What becomes of a quotient; the order is formats/native.py's. BY_BF16: the quotient is rounded
   to bf16 first, as torch does where value and step are both bf16. ZERO: with a zero point.
   UINT8: INT8 + 128. */
typedef enum {
    E4M3,
    E4M3_BY_BF16,
    E2M1,
    E2M1_BY_BF16,
    INT4_BY_BF16,
    INT4_ZERO_BY_BF16,
    INT8,
    UINT8_BY_BF16
} element_t;

INLINE uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
INLINE uint32_t largest(uint32_t a, uint32_t b) { return a > b ? a : b; }
INLINE uint32_t magnitude(float q) { return bits_of(q) & ~SIGN; }
INLINE uint32_t sign(float q) { return bits_of(q) & SIGN; }
INLINE uint32_t is_nan(float q) { return magnitude(q) > INFINITE ? ~0u : 0; }
INLINE int has_zero(element_t element) { return element == INT4_ZERO_BY_BF16; }
INLINE float to_bf16(float x) { return bf16_value(bf16_of(x)); }

/* A float of few fraction bits, smallest its least normal number: |q| rounds to a multiple k of
   2^(e - fraction), where 2^e is the power of two below |q|, or smallest. big is so large that its
   ulp is that multiple: the sum rounds to it and keeps k in its low bits. */
typedef struct {
    uint32_t exponent;
    float big, sum;
} small_float;

INLINE small_float rounded(uint32_t q, int fraction, float smallest) {
    small_float r;
    r.exponent = largest(q, bits_of(smallest)) & INFINITE;
    r.big = float_of(r.exponent + ((uint32_t)(23 - fraction) << 23));
    r.sum = float_of(q) + r.big;
    return r;
}

INLINE small_float rounded_e4m3(float q) {
    return rounded(least(magnitude(q), bits_of(448.0f)), 3, 0.015625f);
}

INLINE small_float rounded_e2m1(float q) {
    return rounded(least(magnitude(q), bits_of(6.0f)), 1, 1.0f);
}

/* Codes count on from one power of two to the next, so k adds to the exponent. Code and sign meet
   at the top of the word: a shift comes last, so that vectors are narrowed to bytes only once. */
INLINE uint8_t e4m3_code(float q) {
    small_float r = rounded_e4m3(q);
    uint32_t code = bits_of(r.sum) + (r.exponent >> 20) - (121 << 3);
    return (uint8_t)(((code | is_nan(q)) << 25 >> 1 | sign(q)) >> 24);
}

INLINE float e4m3_value(float q) {
    small_float r = rounded_e4m3(q);
    return float_of(bits_of(r.sum - r.big) | sign(q) | (is_nan(q) & QUIET_NAN));
}

/* A negative zero becomes a positive one, a negative value that rounds to zero does not. */
INLINE uint8_t e2m1_code(float q) {
    small_float r = rounded_e2m1(q);
    uint32_t code = bits_of(r.sum) + (r.exponent >> 22) - (127 << 1);
    return (uint8_t)((code << 29 >> 1 | (q < 0 ? SIGN : 0)) >> 28);
}

INLINE float e2m1_value(float q) {
    small_float r = rounded_e2m1(q);
    return float_of(bits_of(r.sum - r.big) | (q < 0 ? SIGN : 0));
}

/* One ulp of an fp32 in [2^23, 2^24) is 1: adding this rounds to an integer, to nearest even, and
   leaves it in the low bits. */
#define ROUND 12582912.0f /* 1.5 * 2^23 */

/* ROUND + q, q rounded to an integer in [-half, half). */
INLINE float rounded_integer(float q, float half) {
    float limited = float_of(least(magnitude(q), bits_of(half)) | sign(q));
    return float_of(least(bits_of(limited + ROUND), bits_of(ROUND + half - 1)));
}

INLINE float quotient_of(uint16_t x, float step, float zero, element_t element) {
    /* A step of 0 is a product of scales too small for fp32: any divisor but 0 will do. */
    float q = bf16_value(x) / float_of(bits_of(step) ? bits_of(step) : bits_of(1.0f));
    switch (element) {
    case E4M3:
    case E2M1:
    case INT8: return q;
    case INT4_ZERO_BY_BF16: return to_bf16(to_bf16(q) + zero);
    default: return to_bf16(q);
    }
}

INLINE uint8_t code_of(float q, element_t element) {
    switch (element) {
    case E4M3:
    case E4M3_BY_BF16: return e4m3_code(q);
    case E2M1:
    case E2M1_BY_BF16: return e2m1_code(q);
    case INT4_BY_BF16:
    case INT4_ZERO_BY_BF16: return (uint8_t)((bits_of(rounded_integer(q, 8)) + 8) & 15);
    case INT8: return (uint8_t)bits_of(rounded_integer(q, 128));
    case UINT8_BY_BF16: return (uint8_t)(bits_of(rounded_integer(q, 128)) + 128);
    }
    return 0;
}

INLINE float value_of(float q, float zero, element_t element) {
    switch (element) {
    case E4M3:
    case E4M3_BY_BF16: return e4m3_value(q);
    case E2M1:
    case E2M1_BY_BF16: return e2m1_value(q);
    case INT4_BY_BF16: return rounded_integer(q, 8) - ROUND;
    case INT4_ZERO_BY_BF16: return rounded_integer(q, 8) - ROUND - zero;
    case INT8:
    case UINT8_BY_BF16: return rounded_integer(q, 128) - ROUND;
    }
    return 0;
}

#endif
