/* Whether two tensors hold the same numbers, bit for bit and none of them a NaN. Return early, a
   piece at a time: within one nothing branches. */
#include "common.h"

#define PIECE 4096

/* infinite: the bits of infinity, which those of every NaN exceed but for the sign. */
#define SAME(name, word, magnitudes)                                                               \
    CLONED int name(const word *a, const word *b, int64_t n, word infinite) {                      \
        for (int64_t here; n > 0; n -= here, a += here, b += here) {                               \
            word differing = 0, largest = 0;                                                       \
            here = lesser(PIECE, n);                                                               \
            for (int64_t i = 0; i < here; i++) {                                                   \
                word magnitude = a[i] & magnitudes;                                                \
                differing |= a[i] ^ b[i];                                                          \
                largest = magnitude > largest ? magnitude : largest;                               \
            }                                                                                      \
            if (differing || largest > infinite) return 0;                                         \
        }                                                                                          \
        return 1;                                                                                  \
    }

SAME(mq_same_16, uint16_t, 0x7fff)
SAME(mq_same_32, uint32_t, 0x7fffffff)
