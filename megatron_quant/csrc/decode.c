/* What stored codes stand for, and how far that is from the values that they were made of. */
#include "pieces.h"

/* How elements are stored; the order is formats/native.py's. Two a byte: E2M1 and INT4 (+ 8), the
   even column in the low half. UINT8: INT8 + 128. */
typedef enum { CODE_E4M3, CODE_E2M1, CODE_INT4, CODE_INT8, CODE_UINT8 } code_t;

INLINE int in_byte(code_t code) { return code == CODE_E2M1 || code == CODE_INT4 ? 2 : 1; }

/* A float of few fraction bits whose code c has its sign in bit 7 of a byte (as it is extended to
   a word) and its magnitude in the bits of mask: the value of its bits, were there no subnormals, is
   v. That is above half of implied, the least normal number, and a subnormal is 2 v - implied. */
INLINE float of_small_float(uint32_t c, uint32_t mask, int fraction, uint32_t bias) {
    uint32_t v = ((c & mask) << (23 - fraction)) + ((127 - bias) << 23);
    float implied = float_of((128 - bias) << 23);
    return float_of(least(v, bits_of(float_of(v) + (float_of(v) - implied))));
}

INLINE float of_e4m3(uint8_t code) {
    uint32_t c = (uint32_t)(int32_t)(int8_t)code, nan = (c & 127) == 127 ? INFINITE : 0;
    return float_of(bits_of(of_small_float(c, 127, 3, 7)) | nan | (c & SIGN));
}

INLINE float of_e2m1(uint8_t code) {
    return float_of(bits_of(of_small_float(code, 7, 1, 1)) | (uint32_t)code >> 3 << 31);
}

INLINE float of_code(uint8_t c, code_t code) {
    switch (code) {
    case CODE_E4M3: return of_e4m3(c);
    case CODE_E2M1: return of_e2m1(c);
    case CODE_INT4: return (float)((int32_t)c - 8);
    case CODE_INT8: return (float)(int8_t)c;
    case CODE_UINT8: return (float)((int32_t)c - 128);
    }
    return 0;
}

/* Scales: one an element where many, else one for all. zeros: NULL where there are none. */
INLINE void values_of_run(const uint8_t *codes, int64_t n, const float *steps, const float *zeros,
                          int many, code_t code, float *out) {
    if (zeros) {
        for (int64_t i = 0; i < n; i++) {
            int64_t at = many ? i : 0;
            out[i] = (of_code(codes[i], code) - zeros[at]) * steps[at];
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) out[i] = of_code(codes[i], code) * steps[many ? i : 0];
}

/* bytes: of the piece's first column, which begins one. */
INLINE void values_of_piece(piece_t p, const uint8_t *bytes, code_t code, float *out) {
    uint8_t codes[PIECE];
    float step[PIECE], zero[PIECE];
    if (in_byte(code) == 2) {
        for (int64_t i = 0; i < p.n / 2; i++) {
            codes[2 * i] = bytes[i] & 15;
            codes[2 * i + 1] = bytes[i] >> 4;
        }
        bytes = codes;
    }
    if (p.block < SHORT_BLOCK) {
        spread(p.step, 2 * p.block, 2 * p.at, 2 * p.n, step); /* as if each column were a pair */
        if (p.zero) spread(p.zero, 2 * p.block, 2 * p.at, 2 * p.n, zero);
        values_of_run(bytes, p.n, step, p.zero ? zero : NULL, 1, code, out);
        return;
    }
    for (int64_t n; p.n > 0; p.n -= n, bytes += n, out += n, p.at = 0) {
        n = lesser(p.block - p.at, p.n);
        values_of_run(bytes, n, p.step++, p.zero ? p.zero++ : NULL, 0, code, out);
    }
}

INLINE void decode(const blocks_t *b, const scales_t *s, code_t code, const uint8_t *codes,
                   float *out) {
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t i = 0; i < b->cols; i += PIECE) {
            int64_t at = r * b->cols + i;
            values_of_piece(piece_of(b, s, r, i), codes + at / in_byte(code), code, out + at);
        }
    }
}

/* Only the sizes and blocks of b count. codes: [rows, cols / in_byte], out: fp32 [rows, cols]. */
CLONED void mq_decode(const blocks_t *b, const scales_t *s, code_t code, const uint8_t *codes,
                      float *out) {
    switch (code) {
    case CODE_E4M3: decode(b, s, CODE_E4M3, codes, out); break;
    case CODE_E2M1: decode(b, s, CODE_E2M1, codes, out); break;
    case CODE_INT4: decode(b, s, CODE_INT4, codes, out); break;
    case CODE_INT8: decode(b, s, CODE_INT8, codes, out); break;
    case CODE_UINT8: decode(b, s, CODE_UINT8, codes, out); break;
    }
}

/* Sums in doubles, one a lane: their order is the same on every CPU. As many as a compiler takes
   for a loop of its own. */
#define LANES 32

INLINE void add_squares(const float *x, int64_t n, double *sums) {
    for (; n >= LANES; n -= LANES, x += LANES) {
        for (int l = 0; l < LANES; l++) sums[l] += (double)x[l] * x[l];
    }
    for (int64_t l = 0; l < n; l++) sums[l] += (double)x[l] * x[l];
}

INLINE double total(const double *sums) {
    double all = 0;
    for (int l = 0; l < LANES; l++) all += sums[l];
    return all;
}

INLINE void compare(const blocks_t *b, const scales_t *s, code_t code, const uint8_t *codes,
                 const float *wide, double *own, double *lost) {
    double owns[LANES] = {0}, losts[LANES] = {0};
    float narrow[PIECE], decoded[PIECE];
    for (int64_t r = 0; r < b->rows; r++) {
        for (int64_t i = 0; i < b->cols; i += PIECE) {
            piece_t p = piece_of(b, s, r, i);
            int64_t at = r * b->cols + i;
            const float *w = wide ? wide + at : narrow;
            for (int64_t j = 0; !wide && j < p.n; j++) narrow[j] = bf16_value(p.x[j]);
            values_of_piece(p, codes + at / in_byte(code), code, decoded);
            for (int64_t j = 0; j < p.n; j++) decoded[j] = w[j] - decoded[j];
            add_squares(w, p.n, owns);
            add_squares(decoded, p.n, losts);
        }
    }
    *own = total(owns);
    *lost = total(losts);
}

/* wide: the values in fp32, NULL where they are those of b. own: the sum of x^2. lost: that of
   (x - decoded)^2. */
CLONED void mq_lost(const blocks_t *b, const scales_t *s, code_t code, const uint8_t *codes,
                    const float *wide, double *own, double *lost) {
    switch (code) {
    case CODE_E4M3: compare(b, s, CODE_E4M3, codes, wide, own, lost); break;
    case CODE_E2M1: compare(b, s, CODE_E2M1, codes, wide, own, lost); break;
    case CODE_INT4: compare(b, s, CODE_INT4, codes, wide, own, lost); break;
    case CODE_INT8: compare(b, s, CODE_INT8, codes, wide, own, lost); break;
    case CODE_UINT8: compare(b, s, CODE_UINT8, codes, wide, own, lost); break;
    }
}
