/* The loops that time is spent in: over pairs of neighbours, which share their scale. Nothing in them
   is narrower than 32 bits: compilers are good at such loops. */
#ifndef MEGATRON_QUANT_PAIRS_H
#define MEGATRON_QUANT_PAIRS_H

#include "inverse.h"
#include "pieces.h"

/* -> a word a pair: their byte where rule.tight, else a half each. by: of inverse.h. Scales: one a pair where many, else one for all. */
INLINE void codes_of_pairs(const uint16_t *restrict x, int64_t pairs, const float *restrict by,
                           const float *restrict zero, int many, rule_t rule,
                           uint16_t *restrict out) {
    for (int64_t i = 0; i < pairs; i++) {
        int64_t at = many ? i : 0;
        float z = has_zero(rule.element) ? zero[at] : 0;
        uint32_t pair = pair_at(x + 2 * i);
        uint32_t even = code_of(quotient_of(even_of(pair), by[at], rule), z, rule);
        uint32_t odd = code_of(quotient_of(odd_of(pair), by[at], rule), z, rule);
        if (rule.tight) {
            even |= odd << 4;
            memcpy(out + 2 * i, &even, 4);
        } else {
            set_pair(out + 2 * i, even | odd << 16);
        }
    }
}

/* bf16 values of these codes. */
INLINE void values_of_pairs(const uint16_t *restrict x, int64_t pairs, const float *restrict by,
                            const float *restrict step, const float *restrict zero, int many,
                            rule_t rule, uint16_t *restrict out) {
    for (int64_t i = 0; i < pairs; i++) {
        int64_t at = many ? i : 0;
        float z = has_zero(rule.element) ? zero[at] : 0;
        uint32_t pair = pair_at(x + 2 * i);
        float even = value_of(quotient_of(even_of(pair), by[at], rule), z, rule) * step[at];
        float odd = value_of(quotient_of(odd_of(pair), by[at], rule), z, rule) * step[at];
        set_pair(out + 2 * i, bf16_of(even) | (uint32_t)bf16_of(odd) << 16);
    }
}

#endif
