/* Dividing by a step, or multiplying with its inverse where every bf16 gets the same element so. */
#ifndef MEGATRON_QUANT_INVERSE_H
#define MEGATRON_QUANT_INVERSE_H

#include "elements.h"

/* Of a step: one of 0 is a product of scales too small for fp32, any divisor but 0 will do. */
INLINE float divisor_of(float step) { return or_one(step); }

/* Whether the inverses of all n divisors serve because of what the divisors are. All are finite, and

   - powers of two: quotient and product are the same number, rounded once; or
   - bf16s, where quotients are rounded to bf16. A quotient of two integers a and b of 8 bits is at
     least 2^-17 of itself away from the middle m of two bf16s: a - m * b is an integer, and not 0,
     as m is odd and has 9 bits. The product is no more than 2^-22 away from the quotient, so both
     round to the same bf16, and neither is a tie. */
INLINE int kind_serves(const float *by, int64_t n, element_t element) {
    uint32_t fractions = 0, most = 0;
    for (int64_t i = 0; i < n; i++) fractions |= bits_of(by[i]);
    if (fractions & (by_bf16(element) ? 0xffff : 0x7fffff)) return 0;
    for (int64_t i = 0; i < n; i++) {
        most = largest(most, largest(bits_of(by[i]), bits_of(1.0f / by[i])));
    }
    return most < INFINITE;
}

/* Whether the inverse of one divisor serves where quotients are rounded to bf16: by trying all 128
   fractions. Exponents change none of these roundings, but for quotients below 2^-126, which are
   zeros as elements. */
INLINE int trial_serves(float by) {
    uint32_t differ = 0;
    float inverse = 1.0f / by;
    for (uint32_t fraction = 0; fraction < 128; fraction++) {
        float x = float_of(bits_of(1.0f) | fraction << 16);
        differ |= bits_of(half_even(x / by)) ^ bits_of(half_up(x * inverse));
    }
    return by > 0x1p-80f && by < 0x1p80f && !differ;
}

/* The last divisor that was tried. */
typedef struct {
    float by;
    int serves;
} trial_t;

/* What to divide by, or with rule.inverse to multiply with, for n steps. */
INLINE rule_t divisors(const float *step, int64_t n, element_t element, trial_t *trial,
                       float *out) {
    rule_t rule = {element, 0, 0};
    for (int64_t i = 0; i < n; i++) out[i] = divisor_of(step[i]);
    if (element == E4M3_BY_BF16 && n == 1) {
        if (bits_of(trial->by) != bits_of(*out)) *trial = (trial_t){*out, trial_serves(*out)};
        rule.inverse = trial->serves;
    } else {
        rule.inverse = kind_serves(out, n, element);
    }
    for (int64_t i = 0; rule.inverse && i < n; i++) out[i] = 1.0f / out[i];
    return rule;
}

#endif
