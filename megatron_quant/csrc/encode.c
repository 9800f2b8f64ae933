/* Codes of a tensor whose scales are known: quotient, rounding and packing in one pass. */
#include "pairs.h"

INLINE void codes_of_run(const uint16_t *x, int64_t n, const float *by, const float *zero, int many,
                         rule_t rule, uint16_t *out) {
    codes_of_pairs(x, n / 2, by, zero, many, rule, out);
    if (n % 2) {
        int64_t at = many ? n / 2 : 0;
        float q = quotient_of(bf16_value(x[n - 1]), by[at], rule);
        out[n - 1] = (uint16_t)code_of(q, has_zero(rule.element) ? zero[at] : 0, rule);
    }
}

INLINE void codes_of_blocks(piece_t p, const float *by, rule_t rule, uint16_t *out) {
    float many[PIECE / 2], zero[PIECE / 2];
    if (spreads(p)) {
        spread(by, p.block, p.at, p.n, many);
        if (has_zero(rule.element)) spread(p.zero, p.block, p.at, p.n, zero);
        codes_of_run(p.x, p.n, many, zero, 1, rule, out);
        return;
    }
    for (int64_t n; p.n > 0; p.n -= n, p.x += n, out += n, p.at = 0) {
        n = lesser(p.block - p.at, p.n);
        codes_of_run(p.x, n, by++, has_zero(rule.element) ? p.zero++ : NULL, 0, rule, out);
    }
}

/* Bytes. */
INLINE void encode_piece(piece_t p, element_t element, trial_t *trial, uint8_t *out) {
    float by[PIECE];
    uint16_t codes[PIECE];
    rule_t rule = divisors(p.step, blocks_in(p), element, trial, by);
    if (rule.inverse) {
        codes_of_blocks(p, by, (rule_t){element, 1, 0}, codes);
    } else {
        codes_of_blocks(p, by, (rule_t){element, 0, 0}, codes);
    }
    narrow(codes, p.n, out);
}

/* Nibbles. */
INLINE void encode_nibbles(piece_t p, element_t element, trial_t *trial, uint8_t *out) {
    float by[PIECE];
    uint16_t codes[PIECE];
    rule_t rule = divisors(p.step, blocks_in(p), element, trial, by);
    if (!in_pairs(p)) {
        codes_of_blocks(p, by, rule, codes);
        pack(codes, p.n, out);
        return;
    }
    if (rule.inverse) {
        codes_of_blocks(p, by, (rule_t){element, 1, 1}, codes);
    } else {
        codes_of_blocks(p, by, (rule_t){element, 0, 1}, codes);
    }
    narrow_tight(codes, p.n, out);
}

INLINE void encode(const blocks_t *b, const scales_t *s, element_t element, uint8_t *out) {
    trial_t trial = {0, 0};
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t i = 0; i < b->cols; i += PIECE) {
            piece_t p = piece_of(b, s, r, i);
            if (is_nibble(element)) {
                encode_nibbles(p, element, &trial, out);
                out += p.n / 2;
            } else {
                encode_piece(p, element, &trial, out);
                out += p.n;
            }
        }
    }
}

/* out: a byte an element, [rows, cols]; of 4-bit elements (cols even) half of one. */
CLONED void mq_encode(const blocks_t *b, const scales_t *s, element_t element, uint8_t *out) {
    switch (element) {
    case E4M3: encode(b, s, E4M3, out); break;
    case E4M3_BY_BF16: encode(b, s, E4M3_BY_BF16, out); break;
    case E2M1: encode(b, s, E2M1, out); break;
    case E2M1_BY_BF16: encode(b, s, E2M1_BY_BF16, out); break;
    case INT4_BY_BF16: encode(b, s, INT4_BY_BF16, out); break;
    case INT4_ZERO_BY_BF16: encode(b, s, INT4_ZERO_BY_BF16, out); break;
    case INT8: encode(b, s, INT8, out); break;
    case UINT8_BY_BF16: encode(b, s, UINT8_BY_BF16, out); break;
    }
}
