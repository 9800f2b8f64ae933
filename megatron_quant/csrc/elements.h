/* Rounding of one quotient (value / step) to an element: its code, or the value of that code.
   To nearest, ties to even, saturating, as formats/elements.py. What a NaN becomes is arbitrary,
   but for E4M3, which has one.

   A limit comes before the rounding to bf16: it is a bf16 itself, so the order does not matter, and
   what is left cannot overflow. Magnitudes are compared as bit patterns, which order like them. */
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
INLINE uint32_t is_nan(float q) { return (int32_t)magnitude(q) > INFINITE ? ~0u : 0; }
INLINE int has_zero(element_t element) { return element == INT4_ZERO_BY_BF16; }

INLINE int by_bf16(element_t element) {
    return element != E4M3 && element != E2M1 && element != INT8;
}

INLINE int is_nibble(element_t element) {
    return element != E4M3 && element != E4M3_BY_BF16 && element != INT8 &&
           element != UINT8_BY_BF16;
}

/* inverse: quotients are products with 1 / step, where inverse.h has found that to be the same.
   tight: the codes of a pair make one byte. */
typedef struct {
    element_t element;
    int inverse, tight;
} rule_t;

INLINE float quotient_of(float x, float by, rule_t rule) { return rule.inverse ? x * by : x / by; }

/* To nearest as a bf16, halves away from zero. */
INLINE float half_up(float x) { return float_of((bits_of(x) + 0x8000) & 0xffff0000); }

/* To nearest even as a bf16, |x| <= 2^100; of subnormals something as small. One ulp of 1.5 * 2^16
   times the power of two below |x| is one of x as a bf16. */
INLINE float half_even(float x) {
    float big = float_of((bits_of(x) & INFINITE) + (16u << 23 | 1u << 22));
    return (x + big) - big;
}

/* Of a limited quotient. */
INLINE float to_bf16(float q, rule_t rule) {
    if (!by_bf16(rule.element)) return q;
    return rule.inverse ? half_up(q) : half_even(q);
}

/* x >= 0, but 1 for 0. A condition would split all that follows in two. */
INLINE float or_one(float x) {
    uint32_t is_zero = (uint32_t)((int32_t)(bits_of(x) - 1) >> 31);
    return float_of(bits_of(x) | (is_zero & bits_of(1.0f)));
}

/* A float of few fraction bits, smallest its least normal number: |q| rounds to k times
   2^(e - fraction), where 2^e is the power of two below |q|, or smallest. big is so large that its
   ulp is that unit: sum, with it, rounds to k units and keeps k in its low bits. Rounding to bf16
   first may reach 2^(e + 1), where k ends. */
typedef struct {
    uint32_t exponent, sum, k;
    float value;
} small_float;

INLINE small_float rounded(uint32_t q, int fraction, float smallest, rule_t rule) {
    small_float r;
    float big, sum;
    r.exponent = largest(q, bits_of(smallest)) & INFINITE;
    big = float_of(r.exponent + ((uint32_t)(23 - fraction) << 23));
    sum = to_bf16(float_of(q), rule) + big;
    r.sum = bits_of(sum);
    r.k = bits_of(sum) - bits_of(big);
    r.value = sum - big;
    return r;
}

INLINE small_float rounded_e4m3(float q, rule_t rule) {
    return rounded(least(magnitude(q), bits_of(448.0f)), 3, 0.015625f, rule);
}

INLINE small_float rounded_e2m1(float q, rule_t rule) {
    return rounded(least(magnitude(q), bits_of(6.0f)), 1, 1.0f, rule);
}

/* Codes count on from one power of two to the next, so k adds to the exponent. A NaN was limited to
   448, whose code is one less than its own. */
INLINE uint32_t e4m3_code(float q, rule_t rule) {
    small_float r = rounded_e4m3(q, rule);
    return (r.k + (r.exponent >> 20) - (121 << 3) - is_nan(q)) | sign(q) >> 24;
}

/* Of two quotients, a half word each, whose signs are those of the bf16s in pair. The low half of a
   sum is k. */
INLINE uint32_t e4m3_codes(float even, float odd, uint32_t pair, rule_t rule) {
    small_float low = rounded_e4m3(even, rule), high = rounded_e4m3(odd, rule);
    uint32_t codes = (low.sum & 0xffff) | high.sum << 16;
    codes += (low.exponent >> 20) + (high.exponent >> 4) - 0x10001 * (121 << 3);
    codes -= is_nan(even) + (is_nan(odd) & 0xffff0000);
    return codes | (pair >> 8 & 0x00800080);
}

INLINE float e4m3_value(float q, rule_t rule) {
    small_float r = rounded_e4m3(q, rule);
    return float_of(bits_of(r.value) | sign(q) | (is_nan(q) & QUIET_NAN));
}

/* A negative zero becomes a positive one, a negative quotient that rounds to zero does not. Down to
   half of the least bf16 it is a zero before that. */
INLINE int is_negative(float q, element_t element) {
    return q < (by_bf16(element) ? -0x1p-134f : 0.0f);
}

INLINE uint32_t e2m1_code(float q, rule_t rule) {
    small_float r = rounded_e2m1(q, rule);
    return (r.k + (r.exponent >> 22) - (127 << 1)) | (is_negative(q, rule.element) ? 8 : 0);
}

INLINE float e2m1_value(float q, rule_t rule) {
    small_float r = rounded_e2m1(q, rule);
    return float_of(bits_of(r.value) | (is_negative(q, rule.element) ? SIGN : 0));
}

/* One ulp of an fp32 in [2^23, 2^24) is 1: adding this rounds to an integer, to nearest even, and
   leaves it in the low bits. */
#define ROUND 12582912.0f /* 1.5 * 2^23 */

/* low < 0 < high. As signed integers negative values are less than high, as unsigned ones positive
   values are less than low: each minimum limits its own side. */
INLINE float limited_to(float q, float low, float high) {
    int32_t bits = (int32_t)bits_of(q), most = (int32_t)bits_of(high);
    bits = bits < most ? bits : most;
    return float_of(least((uint32_t)bits, bits_of(low)));
}

/* q, rounded to bf16, + zero. half_up takes any q, infinite ones too. */
INLINE float with_zero(float q, float zero, rule_t rule) {
    if (!rule.inverse) q = limited_to(q, -1048576.0f, 1048576.0f);
    return to_bf16(q, rule) + zero;
}

/* ROUND + q, q (+ zero) rounded to an integer in [-half, half). */
INLINE float rounded_integer(float q, float zero, float half, rule_t rule) {
    if (has_zero(rule.element)) {
        q = limited_to(with_zero(q, zero, rule), -half, half - 1);
        return half_even(q) + ROUND;
    }
    return to_bf16(limited_to(q, -half, half - 1), rule) + ROUND;
}

/* Of the quotient q; zero: its zero point, where elements have one. */
INLINE uint32_t code_of(float q, float zero, rule_t rule) {
    switch (rule.element) {
    case E4M3:
    case E4M3_BY_BF16: return e4m3_code(q, rule);
    case E2M1:
    case E2M1_BY_BF16: return e2m1_code(q, rule);
    case INT4_BY_BF16:
    case INT4_ZERO_BY_BF16: return (bits_of(rounded_integer(q, zero, 8, rule)) + 8) & 15;
    case INT8: return bits_of(rounded_integer(q, 0, 128, rule)) & 255;
    case UINT8_BY_BF16: return (bits_of(rounded_integer(q, 0, 128, rule)) + 128) & 255;
    }
    return 0;
}

INLINE float value_of(float q, float zero, rule_t rule) {
    switch (rule.element) {
    case E4M3:
    case E4M3_BY_BF16: return e4m3_value(q, rule);
    case E2M1:
    case E2M1_BY_BF16: return e2m1_value(q, rule);
    case INT4_BY_BF16: return rounded_integer(q, 0, 8, rule) - ROUND;
    case INT4_ZERO_BY_BF16: return rounded_integer(q, zero, 8, rule) - ROUND - zero;
    case INT8:
    case UINT8_BY_BF16: return rounded_integer(q, 0, 128, rule) - ROUND;
    }
    return 0;
}

#endif
