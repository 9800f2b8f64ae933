/* BLAKE2b (RFC 7693) of many messages, four at a time: lane l of a vector belongs to the l-th one in
   work. Each has the digest that it has alone. For little-endian CPUs. */
#include "common.h"

typedef uint64_t lanes_t __attribute__((vector_size(32)));

/* A vector of the elements of two, counted through both. */
#if defined(__clang__) || __GNUC__ >= 12
#define PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICKED(a, b, ...) __builtin_shuffle(a, b, (lanes_t){__VA_ARGS__})
#endif

#define LANES 4
#define BLOCK 128

static const uint64_t IV[8] = {
    0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu, 0xa54ff53a5f1d36f1u,
    0x510e527fade682d1u, 0x9b05688c2b3e6c1fu, 0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u,
};
static const uint8_t SIGMA[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

#define ROTATED(x, n) (((x) >> (n)) | ((x) << (64 - (n))))
#define MIX(a, b, c, d, x, y)                                                                      \
    do {                                                                                           \
        a += b + (x), d = ROTATED(d ^ a, 32), c += d, b = ROTATED(b ^ c, 24);                      \
        a += b + (y), d = ROTATED(d ^ a, 16), c += d, b = ROTATED(b ^ c, 63);                      \
    } while (0)

/* Words i to i + 3 of each lane's block: a transpose of four by four. */
INLINE void words_of(const uint8_t *const at[LANES], int i, lanes_t m[4]) {
    lanes_t a, b, c, d;
    memcpy(&a, at[0] + 8 * i, sizeof a);
    memcpy(&b, at[1] + 8 * i, sizeof b);
    memcpy(&c, at[2] + 8 * i, sizeof c);
    memcpy(&d, at[3] + 8 * i, sizeof d);
    lanes_t ab = PICKED(a, b, 0, 4, 2, 6), cd = PICKED(c, d, 0, 4, 2, 6);
    m[0] = PICKED(ab, cd, 0, 1, 4, 5);
    m[2] = PICKED(ab, cd, 2, 3, 6, 7);
    ab = PICKED(a, b, 1, 5, 3, 7), cd = PICKED(c, d, 1, 5, 3, 7);
    m[1] = PICKED(ab, cd, 0, 1, 4, 5);
    m[3] = PICKED(ab, cd, 2, 3, 6, 7);
}

/* One block of each lane. at: where the blocks are; count: bytes of each message up to its block's
   end; last: all ones in lanes whose block is the message's last. */
INLINE void compress(lanes_t h[8], const uint8_t *const at[LANES], const lanes_t *count,
                     const lanes_t *last) {
    lanes_t m[16], v[16];
    for (int i = 0; i < 16; i += 4) words_of(at, i, m + i);
    for (int i = 0; i < 8; i++) {
        v[i] = h[i];
        v[i + 8] = (lanes_t){IV[i], IV[i], IV[i], IV[i]};
    }
    v[12] ^= *count; /* messages are shorter than 2^64 bytes */
    v[14] ^= *last;
#define ROUND(r)                                                                                   \
    do {                                                                                           \
        const uint8_t *s = SIGMA[(r) % 10];                                                        \
        MIX(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);                                            \
        MIX(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);                                            \
        MIX(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);                                           \
        MIX(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);                                           \
        MIX(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);                                           \
        MIX(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);                                         \
        MIX(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);                                          \
        MIX(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);                                          \
    } while (0)
    ROUND(0); ROUND(1); ROUND(2); ROUND(3); ROUND(4); ROUND(5);
    ROUND(6); ROUND(7); ROUND(8); ROUND(9); ROUND(10); ROUND(11);
    for (int i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
}

typedef struct {
    const uint8_t *data;
    int64_t nbytes, done; /* done: how many are in earlier blocks */
    int64_t message;      /* -1: the lane idles */
    uint8_t tail[BLOCK];  /* the last block, filled up with zeros */
} lane_t;

/* The next message into a lane; none: what it computes is of no use. */
INLINE void load(lane_t *lane, int l, lanes_t h[8], int64_t message, const uint8_t *const *data,
                 const int64_t *nbytes, int64_t digest_bytes) {
    for (int i = 0; i < 8; i++) h[i][l] = IV[i];
    h[0][l] ^= 0x01010000u ^ (uint64_t)digest_bytes;
    lane->message = message;
    lane->data = message < 0 ? NULL : data[message];
    lane->nbytes = message < 0 ? 0 : nbytes[message];
    lane->done = 0;
}

/* out: [n, digest_bytes] (at most 64, a multiple of 8), for n messages of nbytes at data. */
CLONED void mq_blake2b(const uint8_t *const *data, const int64_t *nbytes, int64_t n,
                       int64_t digest_bytes, uint8_t *out) {
    lane_t lanes[LANES];
    lanes_t h[8];
    int64_t next = 0, busy = 0;
    for (int l = 0; l < LANES; l++) {
        load(&lanes[l], l, h, next < n ? next : -1, data, nbytes, digest_bytes);
        busy += next++ < n;
    }
    while (busy > 0) {
        const uint8_t *at[LANES];
        lanes_t count, last;
        for (int l = 0; l < LANES; l++) {
            lane_t *lane = &lanes[l];
            int64_t left = lane->nbytes - lane->done;
            int ends = left <= BLOCK;
            if (ends) {
                memset(lane->tail, 0, BLOCK);
                if (left > 0) memcpy(lane->tail, lane->data + lane->done, (size_t)left);
            }
            at[l] = ends ? lane->tail : lane->data + lane->done;
            lane->done += ends ? left : BLOCK;
            count[l] = (uint64_t)lane->done;
            last[l] = ends ? ~(uint64_t)0 : 0;
        }
        compress(h, at, &count, &last);
        for (int l = 0; l < LANES; l++) {
            if (!last[l] || lanes[l].message < 0) continue;
            uint64_t words[8];
            for (int i = 0; i < 8; i++) words[i] = h[i][l];
            memcpy(out + lanes[l].message * digest_bytes, words, (size_t)digest_bytes);
            busy -= next >= n;
            load(&lanes[l], l, h, next < n ? next : -1, data, nbytes, digest_bytes);
            next++;
        }
    }
}
