/* The loops that time is spent in: over pairs of neighbours, which share their scale. Nothing in
   them is narrower than 32 bits, and nothing is a branch: compilers turn such loops into vectors as
   they stand. */
#ifndef MEGATRON_QUANT_PAIRS_H
#define MEGATRON_QUANT_PAIRS_H

#include "inverse.h"
#include "pieces.h"

INLINE uint32_t halves(uint32_t even, uint32_t odd) { return even | odd << 16; }

/* In one word: a half each, or one byte where rule.tight. */
INLINE uint32_t codes_of(uint32_t pair, float by, float zero, rule_t rule) {
    float even = quotient_of(even_of(pair), by, rule), odd = quotient_of(odd_of(pair), by, rule);
    if (rule.element == E4M3 || rule.element == E4M3_BY_BF16) {
        uint32_t signs = rule.inverse ? pair : halves(bits_of(even) >> 16, bits_of(odd) >> 16);
        return e4m3_codes(even, odd, signs, rule);
    }
    return code_of(even, zero, rule) | code_of(odd, zero, rule) << (rule.tight ? 4 : 16);
}

/* -> the word of each pair. by: of inverse.h. Scales: one a pair where many, else one for all. */
INLINE void codes_of_pairs(const uint16_t *restrict x, int64_t pairs, const float *restrict by,
                           const float *restrict zero, int many, rule_t rule,
                           uint16_t *restrict out) {
    for (int64_t i = 0; i < pairs; i++) {
        int64_t at = many ? i : 0;
        float z = has_zero(rule.element) ? zero[at] : 0;
        uint32_t codes = codes_of(pair_at(x + 2 * i), by[at], z, rule);
        if (rule.tight) {
            memcpy(out + 2 * i, &codes, 4);
        } else {
            set_pair(out + 2 * i, codes);
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
        set_pair(out + 2 * i, halves(bf16_of(even), bf16_of(odd)));
    }
}

#endif
