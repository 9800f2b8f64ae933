/* What decoding the encoded tensor would give, without its codes. */
#include "pairs.h"

INLINE void values_of_run(const uint16_t *x, int64_t n, const float *by, const float *step,
                          const float *zero, int many, rule_t rule, uint16_t *out) {
    values_of_pairs(x, n / 2, by, step, zero, many, rule, out);
    if (n % 2) {
        int64_t at = many ? n / 2 : 0;
        float z = has_zero(rule.element) ? zero[at] : 0;
        float q = quotient_of(bf16_value(x[n - 1]), by[at], rule);
        out[n - 1] = bf16_of(value_of(q, z, rule) * step[at]);
    }
}

INLINE void values_of_blocks(piece_t p, const float *by, rule_t rule, uint16_t *out) {
    float many[PIECE / 2], step[PIECE / 2], zero[PIECE / 2];
    if (spreads(p)) {
        spread(by, p.block, p.at, p.n, many);
        spread(p.step, p.block, p.at, p.n, step);
        if (has_zero(rule.element)) spread(p.zero, p.block, p.at, p.n, zero);
        values_of_run(p.x, p.n, many, step, zero, 1, rule, out);
        return;
    }
    for (int64_t n; p.n > 0; p.n -= n, p.x += n, out += n, p.at = 0) {
        const float *zeros = has_zero(rule.element) ? p.zero++ : NULL;
        n = lesser(p.block - p.at, p.n);
        values_of_run(p.x, n, by++, p.step++, zeros, 0, rule, out);
    }
}

INLINE void values_of_piece(piece_t p, element_t element, trial_t *trial, uint16_t *out) {
    float by[PIECE];
    rule_t rule = divisors(p.step, blocks_in(p), element, trial, by);
    if (rule.inverse) {
        values_of_blocks(p, by, (rule_t){element, 1, 0}, out);
    } else {
        values_of_blocks(p, by, (rule_t){element, 0, 0}, out);
    }
}

INLINE void fake_quant(const blocks_t *b, const scales_t *s, element_t element, uint16_t *out) {
    trial_t trial = {0, 0};
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t i = 0; i < b->cols; i += PIECE) {
            values_of_piece(piece_of(b, s, r, i), element, &trial, out + r * b->cols + i);
        }
    }
}

/* out: bf16 [rows, cols] */
CLONED void mq_fake_quant(const blocks_t *b, const scales_t *s, element_t element, uint16_t *out) {
    switch (element) {
    case E4M3: fake_quant(b, s, E4M3, out); break;
    case E4M3_BY_BF16: fake_quant(b, s, E4M3_BY_BF16, out); break;
    case E2M1: fake_quant(b, s, E2M1, out); break;
    case E2M1_BY_BF16: fake_quant(b, s, E2M1_BY_BF16, out); break;
    case INT4_BY_BF16: fake_quant(b, s, INT4_BY_BF16, out); break;
    case INT4_ZERO_BY_BF16: fake_quant(b, s, INT4_ZERO_BY_BF16, out); break;
    case INT8: fake_quant(b, s, INT8, out); break;
    case UINT8_BY_BF16: fake_quant(b, s, UINT8_BY_BF16, out); break;
    }
}
