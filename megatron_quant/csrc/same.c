/* Whether two tensors hold the same numbers, bit for bit and none of them a NaN. Return early, a
   piece at a time: within one nothing branches. */
#include "common.h"

#define PIECE 4096

/* infinite: the bits of infinity, which those of every NaN exceed but for the sign. */
CLONED int mq_same_16(const uint16_t *a, const uint16_t *b, int64_t n, uint16_t infinite) {
    for (int64_t here; n > 0; n -= here, a += here, b += here) {
        uint16_t differing = 0, largest = 0;
        here = lesser(PIECE, n);
        for (int64_t i = 0; i < here; i++) {
            uint16_t magnitude = a[i] & 0x7fff;
            differing |= a[i] ^ b[i];
            largest = magnitude > largest ? magnitude : largest;
        }
        if (differing || largest > infinite) return 0;
    }
    return 1;
}

/* Of fp32. */
CLONED int mq_same_32(const uint32_t *a, const uint32_t *b, int64_t n, uint32_t infinite) {
    for (int64_t here; n > 0; n -= here, a += here, b += here) {
        uint32_t differing = 0, largest = 0;
        here = lesser(PIECE, n);
        for (int64_t i = 0; i < here; i++) {
            uint32_t magnitude = a[i] & 0x7fffffff;
            differing |= a[i] ^ b[i];
            largest = magnitude > largest ? magnitude : largest;
        }
        if (differing || largest > infinite) return 0;
    }
    return 1;
}
