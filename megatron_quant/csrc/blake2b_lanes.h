/* BLAKE2b of LANES nodes at a time: lane l of a vector belongs to the l-th one in work. To be
   included once for each kind of vector, with these defined: LANES, 4 or 8; IN_LANES(name), the name
   in this inclusion; SHUFFLES, whether the CPU moves bytes within a word in one instruction; and
   TARGET, for which CPU. */

typedef uint64_t IN_LANES(words) __attribute__((vector_size(8 * LANES)));
#define lanes_t IN_LANES(words)

#define SHIFTED(x, n) ((x) >> (n) | (x) << (64 - (n)))
#if SHUFFLES /* LANES is 4 */
typedef uint8_t IN_LANES(bytes) __attribute__((vector_size(8 * LANES)));
#define WORD(at, k) \
    at + ((k) & 7), at + ((k + 1) & 7), at + ((k + 2) & 7), at + ((k + 3) & 7), \
    at + ((k + 4) & 7), at + ((k + 5) & 7), at + ((k + 6) & 7), at + ((k + 7) & 7)
#define ROTATED(x, n) \
    ((lanes_t)PICKED(IN_LANES(bytes), (IN_LANES(bytes))(x), (IN_LANES(bytes))(x), \
                     WORD(0, n / 8), WORD(8, n / 8), WORD(16, n / 8), WORD(24, n / 8)))
#else
#define ROTATED(x, n) SHIFTED(x, n)
#endif

#define MIX(a, b, c, d, x, y)                                                                      \
    do {                                                                                           \
        a += b + (x), d = ROTATED(d ^ a, 32), c += d, b = ROTATED(b ^ c, 24);                      \
        a += b + (y), d = ROTATED(d ^ a, 16), c += d, b = SHIFTED(b ^ c, 63);                      \
    } while (0)

#define PICK(a, b, ...) PICKED(lanes_t, a, b, __VA_ARGS__)

/* Words LANES * i and on of each lane's block: a transpose. */
#if LANES == 4
INLINE void IN_LANES(load)(const uint8_t *const at[LANES], int i, lanes_t m[LANES]) {
    lanes_t a, b, c, d;
    memcpy(&a, at[0] + 32 * i, sizeof a);
    memcpy(&b, at[1] + 32 * i, sizeof b);
    memcpy(&c, at[2] + 32 * i, sizeof c);
    memcpy(&d, at[3] + 32 * i, sizeof d);
    lanes_t ab = PICK(a, b, 0, 4, 2, 6), cd = PICK(c, d, 0, 4, 2, 6);
    m[0] = PICK(ab, cd, 0, 1, 4, 5);
    m[2] = PICK(ab, cd, 2, 3, 6, 7);
    ab = PICK(a, b, 1, 5, 3, 7), cd = PICK(c, d, 1, 5, 3, 7);
    m[1] = PICK(ab, cd, 0, 1, 4, 5);
    m[3] = PICK(ab, cd, 2, 3, 6, 7);
}
#else
INLINE void IN_LANES(load)(const uint8_t *const at[LANES], int i, lanes_t m[LANES]) {
    lanes_t rows[8], pairs[8];
    for (int l = 0; l < 8; l++) memcpy(&rows[l], at[l] + 64 * i, sizeof rows[l]);
    for (int l = 0; l < 8; l += 2) {
        pairs[l] = PICK(rows[l], rows[l + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        pairs[l + 1] = PICK(rows[l], rows[l + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int odd = 0; odd < 2; odd++) { /* words odd, odd + 2, odd + 4 and odd + 6 */
        const lanes_t *p = pairs + odd;
        lanes_t low = PICK(p[0], p[2], 0, 1, 8, 9, 4, 5, 12, 13);
        lanes_t high = PICK(p[4], p[6], 0, 1, 8, 9, 4, 5, 12, 13);
        m[odd] = PICK(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
        m[odd + 4] = PICK(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
        low = PICK(p[0], p[2], 2, 3, 10, 11, 6, 7, 14, 15);
        high = PICK(p[4], p[6], 2, 3, 10, 11, 6, 7, 14, 15);
        m[odd + 2] = PICK(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
        m[odd + 6] = PICK(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#endif

/* One block of each lane. at: where the blocks are; count: bytes of each node up to its block's
   end; last, last_node: all ones in lanes whose block is the node's last (and the node the last
   beside others). */
INLINE void IN_LANES(compress)(lanes_t h[8], const uint8_t *const at[LANES], const lanes_t *count,
                               const lanes_t *last, const lanes_t *last_node) {
    lanes_t m[16], v[16];
    for (int i = 0; i < 16 / LANES; i++) IN_LANES(load)(at, i, m + LANES * i);
    for (int i = 0; i < 8; i++) {
        v[i] = h[i];
        v[i + 8] = (lanes_t){0} + IV[i];
    }
    v[12] ^= *count; /* nodes are shorter than 2^64 bytes */
    v[14] ^= *last;
    v[15] ^= *last_node;
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

/* The next node into a lane; where there is none, zeros, whose result is of no use. */
INLINE void IN_LANES(take)(nodes_t *nodes, node_t *node, int l, lanes_t h[8]) {
    *node = next_node(nodes);
    for (int i = 0; i < 8; i++) h[i][l] = IV[i] ^ (i < 3 ? node->parameters[i] : 0);
}

TARGET static void IN_LANES(hash)(nodes_t *nodes) {
    uint8_t tails[LANES][BLOCK]; /* last blocks, filled up with zeros */
    node_t lanes[LANES];
    lanes_t h[8], count = {0};
    int busy = 0;
    for (int l = 0; l < LANES; l++) {
        IN_LANES(take)(nodes, &lanes[l], l, h);
        busy += lanes[l].out != NULL;
    }
    while (busy > 0) {
        const uint8_t *at[LANES];
        lanes_t last = {0}, last_node = {0};
        int64_t together = INT64_MAX; /* blocks before any lane's last */
        for (int l = 0; l < LANES; l++) {
            at[l] = lanes[l].data;
            if (lanes[l].out) together = lesser(together, (lanes[l].left - 1) / BLOCK);
        }
        for (int64_t i = 0; i < together; i++) {
            count += BLOCK;
            IN_LANES(compress)(h, at, &count, &last, &last_node);
            for (int l = 0; l < LANES; l++) at[l] += lanes[l].step;
        }
        for (int l = 0; l < LANES; l++) {
            int64_t left = lanes[l].left -= together * lanes[l].step;
            int ends = lanes[l].out && left <= BLOCK;
            last[l] = ends ? ~(uint64_t)0 : 0;
            last_node[l] = ends && lanes[l].last ? ~(uint64_t)0 : 0;
            count[l] += (uint64_t)lesser(left, BLOCK);
            lanes[l].data = at[l] + lanes[l].step;
            if (!ends) continue;
            memset(tails[l], 0, BLOCK);
            if (left > 0) memcpy(tails[l], at[l], (size_t)left);
            at[l] = tails[l];
        }
        IN_LANES(compress)(h, at, &count, &last, &last_node);
        for (int l = 0; l < LANES; l++) {
            lanes[l].left -= lanes[l].step;
            if (!last[l]) continue;
            uint64_t words[DIGEST / 8];
            for (int i = 0; i < DIGEST / 8; i++) words[i] = h[i][l];
            memcpy(lanes[l].out, words, DIGEST);
            IN_LANES(take)(nodes, &lanes[l], l, h);
            count[l] = 0;
            busy -= lanes[l].out == NULL;
        }
    }
}

#undef LANES
#undef SHUFFLES
#undef IN_LANES
#undef TARGET
#undef lanes_t
#undef SHIFTED
#undef WORD
#undef ROTATED
#undef MIX
#undef PICK
#undef ROUND
