/* BLAKE2b-256 (RFC 7693) in the tree mode of its specification (section 2.10): a message is cut into
   leaves, and its digest is that of the root, which is made of the leaves' digests. Leaves depend on
   nothing but their bytes and place, so several are hashed at a time. For little-endian CPUs. */
#include "common.h"

#define BLOCK 128
#define DIGEST 32
#define DEPTH 2

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

/* A message, or some leaves of one. first: number of the first leaf; ends: whether the last leaf is
   the message's last. */
typedef struct {
    const uint8_t *data;
    int64_t nbytes, first, ends;
} message_t;

/* Nodes that are not in work yet. depth: 0 for the leaves of messages; 1 where each message is what
   its root is made of. at: bytes of the first message that are done; out: for the next digest. */
typedef struct {
    const message_t *message, *end;
    int64_t leaf_bytes, depth, at;
    uint8_t *out;
} nodes_t;

/* A node in a lane; data and left, in bytes, move on by step. parameters: the words of BLAKE2b's
   parameter block that are not 0. last: whether it is the last of its siblings. out: NULL where there
   is none, and the lane reads zeros again and again. */
typedef struct {
    const uint8_t *data;
    int64_t left, step, last;
    uint64_t parameters[3];
    uint8_t *out;
} node_t;

INLINE node_t next_node(nodes_t *nodes) {
    static const uint8_t ZEROS[BLOCK];
    const message_t *message = nodes->message;
    node_t node = {ZEROS, 0, 0, 0, {0}, NULL};
    if (message == nodes->end) return node;
    int64_t left = message->nbytes - nodes->at;
    node.data = message->data + nodes->at;
    node.left = nodes->depth ? left : lesser(left, nodes->leaf_bytes);
    node.step = BLOCK;
    node.last = node.left == left && message->ends;
    node.parameters[0] = DIGEST | DEPTH << 24 | (uint64_t)nodes->leaf_bytes << 32;
    node.parameters[1] = (uint64_t)(message->first + nodes->at / nodes->leaf_bytes);
    node.parameters[2] = (uint64_t)nodes->depth | DIGEST << 8;
    node.out = nodes->out;
    nodes->out += DIGEST;
    nodes->at += node.left;
    if (node.left == left) {
        nodes->message++;
        nodes->at = 0;
    }
    return node;
}

/* A vector of the elements of two, counted through both. */
#if defined(__clang__) || __GNUC__ >= 12
#define PICKED(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICKED(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

/* For CPUs whose vectors make it faster than one node after the other; the widest are chosen when it
   is called. */
#if defined(__x86_64__) && defined(__GNUC__)
#define LANES 8
#define SHUFFLES 0 /* it rotates words in one instruction */
#define IN_LANES(name) name##_avx512
#define TARGET __attribute__((target("avx512f")))
#include "blake2b_lanes.h"
#define LANES 4
#define SHUFFLES 1
#define IN_LANES(name) name##_avx2
#define TARGET __attribute__((target("avx2")))
#include "blake2b_lanes.h"

INLINE int hash_all(nodes_t *nodes) {
    if (__builtin_cpu_supports("avx512f")) {
        hash_avx512(nodes);
        return 1;
    }
    if (__builtin_cpu_supports("avx2")) {
        hash_avx2(nodes);
        return 1;
    }
    return 0;
}
#else
INLINE int hash_all(nodes_t *nodes) { return 0; }
#endif

/* out: a digest for each leaf of n messages (depth 0: a message without bytes is one leaf, leaf_bytes
   a multiple of 128), or for each message as a root (depth 1: the digests of its leaves). 0 where the
   CPU has no such vectors: then nothing is done. */
int mq_blake2b(const message_t *messages, int64_t n, int64_t leaf_bytes, int64_t depth,
               uint8_t *out) {
    nodes_t nodes = {messages, messages + n, leaf_bytes, depth, 0, out};
    return hash_all(&nodes);
}
