/* What the kernels share: the tensors they read, bf16 by hand, and one build for several
   instruction sets.

   Results are those of the torch code in formats/, bit for bit: every fp32 operation is here once
   and in the same order, to be neither contracted nor reordered (-ffp-contract=off, no -ffast-math).
   Loops are plain, for the compiler to vectorize. */
#ifndef MEGATRON_QUANT_COMMON_H
#define MEGATRON_QUANT_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The loader picks the widest clone that the CPU has, so a library built on one machine runs on
   another. It needs the loader's help (ifunc), hence glibc. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(MEGATRON_QUANT_ONE_CLONE)
#define CLONED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONED
#endif

/* A kernel is one loop, made once per element type, which its inlined parts know. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* Rows of bf16, contiguous, cut into blocks along each row. first: how many columns of the first
   block lie before column 0 (0 <= first < block). */
typedef struct {
    const uint16_t *x;
    int64_t rows, cols, block, first;
} blocks_t;

/* Their scales in fp32, one a block. step: the value of one unit of an element. zero: the element
   that stands for 0, NULL where that is 0. stride: from one row to the next, 0 where all share. */
typedef struct {
    const float *step, *zero;
    int64_t stride;
} scales_t;

/* Whether the first of two neighbours in memory is the low half of the word that they make. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define LITTLE 0
#else
#define LITTLE 1
#endif

INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t blocks_in_row(const blocks_t *b) {
    return (b->first + b->cols + b->block - 1) / b->block;
}

INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

INLINE float bf16_value(uint16_t x) { return float_of((uint32_t)x << 16); }

/* To nearest, ties to even; the NaNs that arithmetic makes stay NaNs. By hand: few CPUs have an
   instruction for it, and that of AVX-512 flushes subnormals. */
INLINE uint16_t bf16_of(float x) {
    uint32_t u = bits_of(x);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* Two neighbours of a row, the even one in the low half. */
INLINE uint32_t pair_at(const uint16_t *x) {
    uint32_t both;
    memcpy(&both, x, 4);
    return LITTLE ? both : both >> 16 | both << 16;
}

INLINE void set_pair(uint16_t *x, uint32_t pair) {
    pair = LITTLE ? pair : pair >> 16 | pair << 16;
    memcpy(x, &pair, 4);
}

#endif
