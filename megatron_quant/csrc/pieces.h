/* A row is worked on in pieces that stay in the first-level cache from one loop to the next, and
   these two elements at a time: a vector of pairs needs no unpacking. */
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

/* Blocks shorter than this get their scales written out for each pair: one long loop over a piece
   is worth more than short ones that need not load their scale. */
#define SHORT_BLOCK 128

INLINE int64_t blocks_in(piece_t p) { return (p.at + p.n + p.block - 1) / p.block; }

INLINE int in_pairs(piece_t p) { return (p.block | p.at) % 2 == 0; }
INLINE int spreads(piece_t p) { return p.block < SHORT_BLOCK && in_pairs(p); }

/* scale: one a block, the first of which has n columns from column at on -> one a pair of them. */
INLINE void spread(const float *scale, int64_t block, int64_t at, int64_t n, float *out) {
    int64_t pairs = (n + 1) / 2;
    block /= 2, at /= 2;
    for (; block % 8 == 0 && at == 0 && pairs >= block; pairs -= block, scale++) {
        for (int64_t i = 0; i < block; i += 8) {
            for (int j = 0; j < 8; j++) *out++ = *scale; /* a few stores: the compiler knows 8 */
        }
    }
    for (int64_t here; pairs > 0; pairs -= here, scale++, at = 0) {
        here = lesser(block - at, pairs);
        for (int64_t i = 0; i < here; i++) *out++ = *scale;
    }
}

INLINE float even_of(uint32_t pair) { return float_of(pair << 16); }
INLINE float odd_of(uint32_t pair) { return float_of(pair & 0xffff0000); }

/* Codes one by one -> a byte each. */
INLINE void narrow(const uint16_t *codes, int64_t n, uint8_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = (uint8_t)codes[i];
}

/* Codes one by one -> two a byte, that of the even column in its low half. */
INLINE void pack(const uint16_t *codes, int64_t n, uint8_t *out) {
    for (int64_t i = 0; i < n; i += 2) *out++ = (uint8_t)(codes[i] | codes[i + 1] << 4);
}

/* Words of n tight codes -> two a byte. */
INLINE void narrow_tight(const uint16_t *codes, int64_t n, uint8_t *out) {
    for (int64_t i = 0; i < n / 2; i++) {
        uint32_t word;
        memcpy(&word, codes + 2 * i, 4);
        out[i] = (uint8_t)word;
    }
}

#endif
