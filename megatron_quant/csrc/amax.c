/* The statistic of each block of a row. bf16 magnitudes order like their bits, so it is a maximum
   of integers, in which a NaN wins. */
#include "amax.h"

INLINE void amax_of_row(const uint16_t *x, const blocks_t *b, float *out) {
    for (int64_t i = 0, end = b->block - b->first; i < b->cols; i = end, end += b->block) {
        *out++ = amax_of(x + i, lesser(end, b->cols) - i);
    }
}

/* out: max |x|, [rows, blocks in a row] */
CLONED void mq_amax(const blocks_t *b, float *out) {
    int64_t per_row = blocks_in_row(b);
    int whole = b->first == 0 && b->cols % b->block == 0;
    if (whole && b->block == 16) {
        amax_of_blocks(b->x, b->rows * per_row, 16, out);
    } else if (whole && b->block == 32) {
        amax_of_blocks(b->x, b->rows * per_row, 32, out);
    } else {
        for (int64_t r = 0; r < b->rows; r++) {
            amax_of_row(b->x + r * b->cols, b, out + r * per_row);
        }
    }
}

/* out: max(x, 0) and max(-x, 0) of n values. As signed integers, values of the other sign are
   less than 0, whatever they are. */
INLINE void ends_of(const uint16_t *x, int64_t n, float *out) {
    int16_t high = 0, low = 0;
    for (int64_t i = 0; i < n; i++) {
        int16_t up = (int16_t)x[i], down = (int16_t)(x[i] ^ 0x8000);
        high = up > high ? up : high;
        low = down > low ? down : low;
    }
    out[0] = bf16_value((uint16_t)high);
    out[1] = bf16_value((uint16_t)low);
}

/* out: [rows, blocks in a row, 2] */
CLONED void mq_ends(const blocks_t *b, float *out) {
    for (int64_t r = 0; r < b->rows; r++) {
        const uint16_t *x = b->x + r * b->cols;
        for (int64_t i = 0, end = b->block - b->first; i < b->cols; i = end, end += b->block) {
            ends_of(x + i, lesser(end, b->cols) - i, out);
            out += 2;
        }
    }
}
