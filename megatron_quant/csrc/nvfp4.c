/* NVFP4 from its values in one pass: its scales are so many that their time counts. */
#include "amax.h"
#include "pairs.h"

#define BLOCK 16

/* Of n columns, whole blocks. scale: E4M3 of amax / (6 * tensor). step: its value * tensor. by: the
   divisor. */
INLINE void scales_of_piece(const uint16_t *x, int64_t n, float tensor, uint8_t *scale,
                            float *restrict step, float *restrict by) {
    float most = 6.0f * tensor;
    uint32_t codes[PIECE / BLOCK];
    rule_t e4m3 = {E4M3, 0, 0};
    amax_of_blocks(x, n / BLOCK, BLOCK, step);
    for (int64_t i = 0; i < n / BLOCK; i++) {
        float exact = or_one(step[i] / most);
        exact = float_of(largest(bits_of(exact), bits_of(0x1p-9f))); /* a NaN is larger */
        codes[i] = e4m3_code(exact, e4m3);
        step[i] = e4m3_value(exact, e4m3) * tensor;
        by[i] = divisor_of(step[i]);
    }
    for (int64_t i = 0; i < n / BLOCK; i++) scale[i] = (uint8_t)codes[i];
}

/* tensor: one step a row. scale: [rows, cols / 16], out: [rows, cols / 2]. */
CLONED void mq_nvfp4_encode(const blocks_t *b, const scales_t *tensor, uint8_t *scale,
                            uint8_t *out) {
    float step[PIECE / BLOCK], by[PIECE / BLOCK], bys[PIECE / 2];
    uint16_t codes[PIECE];
    rule_t e2m1 = {E2M1, 0, 1};
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t at = 0, n; at < b->cols; at += n, scale += n / BLOCK, out += n / 2) {
            const uint16_t *x = b->x + r * b->cols + at;
            n = lesser(PIECE, b->cols - at);
            scales_of_piece(x, n, tensor->step[r * tensor->stride], scale, step, by);
            spread(by, BLOCK, 0, n, bys);
            codes_of_pairs(x, n / 2, bys, NULL, 1, e2m1, codes);
            narrow_tight(codes, n, out);
        }
    }
}

/* out: bf16 [rows, cols] */
CLONED void mq_nvfp4_fake_quant(const blocks_t *b, const scales_t *tensor, uint16_t *out) {
    float step[PIECE / BLOCK], by[PIECE / BLOCK], steps[PIECE / 2], bys[PIECE / 2];
    uint8_t scale[PIECE / BLOCK];
    rule_t e2m1 = {E2M1, 0, 0};
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t at = 0, n; at < b->cols; at += n, out += n) {
            const uint16_t *x = b->x + r * b->cols + at;
            n = lesser(PIECE, b->cols - at);
            scales_of_piece(x, n, tensor->step[r * tensor->stride], scale, step, by);
            spread(by, BLOCK, 0, n, bys);
            spread(step, BLOCK, 0, n, steps);
            values_of_pairs(x, n / 2, bys, steps, NULL, 1, e2m1, out);
        }
    }
}
