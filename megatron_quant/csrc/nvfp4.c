/* NVFP4 from its values in one pass: its scales are so many that their time counts. */
#include "amax.h"
#include "pieces.h"

#define BLOCK 16

INLINE float limited(float x, float low, float high) { /* x > 0; a NaN stays one */
    uint32_t most = is_nan(x) ? bits_of(x) : bits_of(high);
    return float_of(largest(least(bits_of(x), most), bits_of(low)));
}

/* Of n columns, whole blocks. scale: E4M3 of amax / (6 * tensor), one a block. step: its value *
   tensor, one an element. */
INLINE void scales_of_piece(const uint16_t *x, int64_t n, float tensor, uint8_t *scale,
                            float *step) {
    float amax[PIECE / BLOCK] = {0}, most = 6.0f * tensor;
    amax_of_blocks(x, n / BLOCK, BLOCK, amax);
    for (int64_t i = 0; i < n / BLOCK; i++) {
        float exact = amax[i] / most;
        exact = limited(exact == 0 ? 1.0f : exact, 0x1p-9f, 448.0f);
        scale[i] = e4m3_code(exact);
        amax[i] = e4m3_value(exact) * tensor;
    }
    spread(amax, BLOCK, 0, n, step);
}

/* tensor: one step a row. scale: [rows, cols / 16], out: [rows, cols / 2]. */
CLONED void mq_nvfp4_encode(const blocks_t *b, const scales_t *tensor, uint8_t *scale,
                            uint8_t *out) {
    float step[PIECE];
    uint8_t codes[PIECE];
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t at = 0, n; at < b->cols; at += n, scale += n / BLOCK, out += n / 2) {
            const uint16_t *x = b->x + r * b->cols + at;
            n = lesser(PIECE, b->cols - at);
            scales_of_piece(x, n, tensor->step[r * tensor->stride], scale, step);
            for (int64_t i = 0; i < n; i++) {
                codes[i] = code_of(quotient_of(x[i], step[i], 0, E2M1), E2M1);
            }
            pack(codes, n / 2, out);
        }
    }
}

/* out: bf16 [rows, cols] */
CLONED void mq_nvfp4_fake_quant(const blocks_t *b, const scales_t *tensor, uint16_t *out) {
    float step[PIECE];
    uint8_t scale[PIECE / BLOCK];
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t at = 0, n; at < b->cols; at += n, out += n) {
            const uint16_t *x = b->x + r * b->cols + at;
            n = lesser(PIECE, b->cols - at);
            scales_of_piece(x, n, tensor->step[r * tensor->stride], scale, step);
            for (int64_t i = 0; i < n; i++) {
                float q = quotient_of(x[i], step[i], 0, E2M1);
                out[i] = bf16_of(value_of(q, 0, E2M1) * step[i]);
            }
        }
    }
}
