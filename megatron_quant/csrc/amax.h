/* Largest magnitudes. */
#ifndef MEGATRON_QUANT_AMAX_H
#define MEGATRON_QUANT_AMAX_H

#include "common.h"

INLINE float amax_of(const uint16_t *x, int64_t n) {
    uint16_t largest = 0;
#pragma GCC unroll 1 /* else short blocks become a vector of blocks, which takes many shuffles */
    for (int64_t i = 0; i < n; i++) {
        uint16_t magnitude = x[i] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return bf16_value(largest);
}

/* Of whole blocks; their size is to be a constant. */
INLINE void amax_of_blocks(const uint16_t *x, int64_t blocks, int64_t block, float *out) {
    for (int64_t b = 0; b < blocks; b++) out[b] = amax_of(x + b * block, block);
}

#endif
