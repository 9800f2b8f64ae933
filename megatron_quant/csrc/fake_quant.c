/* What decoding the encoded tensor would give, without its codes. */
#include "pieces.h"

/* Scales: one an element where many, else one for all. */
INLINE void values_of_run(const uint16_t *x, int64_t n, const float *steps, const float *zeros,
                          int many, element_t element, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) {
        int64_t at = many ? i : 0;
        float step = steps[at], zero = has_zero(element) ? zeros[at] : 0;
        float q = quotient_of(x[i], step, zero, element);
        out[i] = bf16_of(value_of(q, zero, element) * step);
    }
}

INLINE void values_of_piece(piece_t p, element_t element, uint16_t *out) {
    float step[PIECE], zero[PIECE];
    if (p.block < SHORT_BLOCK) {
        spread(p.step, p.block, p.at, p.n, step);
        if (has_zero(element)) spread(p.zero, p.block, p.at, p.n, zero);
        values_of_run(p.x, p.n, step, zero, 1, element, out);
        return;
    }
    for (int64_t n; p.n > 0; p.n -= n, p.x += n, out += n, p.at = 0) {
        n = lesser(p.block - p.at, p.n);
        values_of_run(p.x, n, p.step++, has_zero(element) ? p.zero++ : NULL, 0, element, out);
    }
}

INLINE void fake_quant(const blocks_t *b, const scales_t *s, element_t element, uint16_t *out) {
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t i = 0; i < b->cols; i += PIECE) {
            values_of_piece(piece_of(b, s, r, i), element, out + r * b->cols + i);
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
