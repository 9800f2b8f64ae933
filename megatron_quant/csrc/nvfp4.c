/* NVFP4 from its values in one pass: its scales are so many that their time counts. */
#include "amax.h"
#include "pairs.h"

#define BLOCK 16

INLINE float limited(float x, float low, float high) { /* x > 0; a NaN stays one */
    uint32_t most = is_nan(x) ? bits_of(x) : bits_of(high);
    return float_of(largest(least(bits_of(x), most), bits_of(low)));
}

/* Of n columns, whole blocks. scale: E4M3 of amax / (6 * tensor). step: its value * tensor. */
INLINE void scales_of_piece(const uint16_t *x, int64_t n, float tensor, uint8_t *scale,
                            float *step) {
    float most = 6.0f * tensor;
    uint32_t codes[PIECE / BLOCK];
    rule_t e4m3 = {E4M3, 0, 0};
    amax_of_blocks(x, n / BLOCK, BLOCK, step);
    for (int64_t i = 0; i < n / BLOCK; i++) {
        float exact = step[i] / most;
        exact = limited(exact == 0 ? 1.0f : exact, 0x1p-9f, 448.0f);
        codes[i] = e4m3_code(exact, e4m3);
        step[i] = e4m3_value(exact, e4m3) * tensor;
    }
    for (int64_t i = 0; i < n / BLOCK; i++) scale[i] = (uint8_t)codes[i];
}

/* step: one a block -> for each pair what to divide by. */
INLINE void spread_divisors(const float *step, int64_t n, float *by) {
    float one[PIECE / BLOCK];
    for (int64_t i = 0; i < n / BLOCK; i++) one[i] = divisor_of(step[i]);
    spread(one, BLOCK, 0, n, by);
}

/* tensor: one step a row. scale: [rows, cols / 16], out: [rows, cols / 2]. */
CLONED void mq_nvfp4_encode(const blocks_t *b, const scales_t *tensor, uint8_t *scale,
                            uint8_t *out) {
    float step[PIECE / BLOCK], by[PIECE / 2];
    uint16_t codes[PIECE];
    rule_t e2m1 = {E2M1, 0, 1};
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t at = 0, n; at < b->cols; at += n, scale += n / BLOCK, out += n / 2) {
            const uint16_t *x = b->x + r * b->cols + at;
            n = lesser(PIECE, b->cols - at);
            scales_of_piece(x, n, tensor->step[r * tensor->stride], scale, step);
            spread_divisors(step, n, by);
            codes_of_pairs(x, n / 2, by, NULL, 1, e2m1, codes);
            narrow_tight(codes, n, out);
        }
    }
}

/* out: bf16 [rows, cols] */
CLONED void mq_nvfp4_fake_quant(const blocks_t *b, const scales_t *tensor, uint16_t *out) {
    float step[PIECE / BLOCK], steps[PIECE / 2], by[PIECE / 2];
    uint8_t scale[PIECE / BLOCK];
    rule_t e2m1 = {E2M1, 0, 0};
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t at = 0, n; at < b->cols; at += n, out += n) {
            const uint16_t *x = b->x + r * b->cols + at;
            n = lesser(PIECE, b->cols - at);
            scales_of_piece(x, n, tensor->step[r * tensor->stride], scale, step);
            spread_divisors(step, n, by);
            spread(step, BLOCK, 0, n, steps);
            values_of_pairs(x, n / 2, by, steps, NULL, 1, e2m1, out);
        }
    }
}
