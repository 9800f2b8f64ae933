"""The digest of a tensor's bytes: BLAKE2b-256 in the tree mode of its specification.

A message is cut into leaves of 64 KiB, and its digest is that of the root, which is made of the
leaves' digests: so many leaves can be hashed side by side, which is several times faster than one
after the other. ``hashlib.blake2b`` makes the same with ``fanout=0, depth=2, leaf_size=65536,
inner_size=32`` (https://www.blake2.net/blake2.pdf, section 2.10).
"""

import hashlib
from collections.abc import Iterable, Sequence

from megatron_quant.formats import native
from megatron_quant.formats.native import Leaves

ABOUT = "BLAKE2b-256 tree (leaves of 64 KiB, unlimited fanout) of the tensor's bytes in its file"
LEAF_BYTES = 1 << 16
DIGEST_BYTES = 32


def digests(messages: Sequence[memoryview]) -> list[str]:
    """The digest of each message, in hexadecimal."""
    leaves = _hashed([Leaves(message) for message in messages], depth=0)
    ends, end = [], 0
    for message in messages:
        end += DIGEST_BYTES * _leaves_in(message)
        ends.append(end)
    of_each = zip([0, *ends], ends, strict=False)
    roots = _hashed([Leaves(leaves[slice(*at)]) for at in of_each], depth=1)
    return [
        roots[i : i + DIGEST_BYTES].hex() for i in range(0, DIGEST_BYTES * len(ends), DIGEST_BYTES)
    ]


def digest_of(pieces: Iterable[memoryview], nbytes: int) -> str:
    """The digest of a message of ``nbytes`` that comes in pieces.

    All of them but the last are some leaves long. Their memory may be used again for the next one.
    """
    leaves, done = bytearray(), 0
    for piece in pieces:
        leaves += _hashed([Leaves(piece, done // LEAF_BYTES, done + len(piece) == nbytes)], depth=0)
        done += len(piece)
    assert done == nbytes, (done, nbytes)
    return bytes(_hashed([Leaves(memoryview(leaves))], depth=1)).hex()


def _leaves_in(message: memoryview) -> int:
    return max(-(-len(message) // LEAF_BYTES), 1)


def _hashed(pieces: Sequence[Leaves], depth: int) -> memoryview:
    """Digests of all leaves of the pieces (depth 0) or of a root for each (depth 1)."""
    counts = [1 if depth else _leaves_in(piece.data) for piece in pieces]
    found = native.blake2b(pieces, LEAF_BYTES, depth, sum(counts))
    return memoryview(b"".join(_in_python(pieces, counts, depth)) if found is None else found)


def _in_python(pieces: Sequence[Leaves], counts: Sequence[int], depth: int) -> Iterable[bytes]:
    for piece, count in zip(pieces, counts, strict=True):
        width = len(piece.data) if depth else LEAF_BYTES
        for i in range(count):
            yield hashlib.blake2b(
                piece.data[i * width : (i + 1) * width],
                digest_size=DIGEST_BYTES,
                fanout=0,
                depth=2,
                leaf_size=LEAF_BYTES,
                inner_size=DIGEST_BYTES,
                node_offset=piece.first + i,
                node_depth=depth,
                last_node=piece.ends and i == count - 1,
            ).digest()
