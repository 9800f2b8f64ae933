/* A row is worked on in pieces that stay in the first-level cache from one loop to the next. */
#ifndef MEGATRON_QUANT_PIECES_H
#define MEGATRON_QUANT_PIECES_H

#include "elements.h"

#define PIECE 1024

/* n <= PIECE columns of a row: the first is column at of the block whose scales come first. */
typedef struct {
    const uint16_t *x;
    const float *step, *zero;
    int64_t n, block, at;
} piece_t;

/* The piece of row r from column start on. */
INLINE piece_t piece_of(const blocks_t *b, const scales_t *s, int64_t r, int64_t start) {
    int64_t column = b->first + start, from = r * s->stride + column / b->block;
    piece_t p = {b->x + r * b->cols + start, s->step + from, s->zero ? s->zero + from : NULL,
                 lesser(PIECE, b->cols - start), b->block, column % b->block};
    return p;
}

/* Blocks shorter than this get their scales written out for each element: one long loop over a
   piece is worth more than short ones that need not load their scale. */
#define SHORT_BLOCK 128

/* scale: one a block, the first of which has n columns from column at on -> one an element. */
INLINE void spread(const float *scale, int64_t block, int64_t at, int64_t n, float *out) {
    for (; block == 16 && at == 0 && n >= 16; n -= 16, scale++) {
        for (int i = 0; i < 16; i++) *out++ = *scale; /* a few stores: the compiler knows 16 */
    }
    for (int64_t here; n > 0; n -= here, scale++, at = 0) {
        here = lesser(block - at, n);
        for (int64_t i = 0; i < here; i++) *out++ = *scale;
    }
}

/* Even column in the low half of a byte. */
INLINE void pack(const uint8_t *codes, int64_t bytes, uint8_t *out) {
    for (int64_t i = 0; i < bytes; i++) {
        out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    }
}

#endif
