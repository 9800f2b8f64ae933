"""The digest of a tensor's bytes: BLAKE2b-256 in the tree mode of its specification.

A tensor is cut into leaves of 64 KiB, and its digest is that of the root, which is made of the
leaves' digests: so many leaves can be hashed side by side, which is several times faster than one
after the other, and by several ranks. ``hashlib.blake2b`` makes the same with ``fanout=0, depth=2,
leaf_size=65536, inner_size=32`` (https://www.blake2.net/blake2.pdf, section 2.10).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_quant.native import Leaves, library

ABOUT = "BLAKE2b-256 tree (leaves of 64 KiB, unlimited fanout) of the tensor's bytes in its file"
LEAF_BYTES = 1 << 16
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Hashed:
    """A tensor, or some leaves of one, that was hashed.

    first: number of the first of these leaves. leaves: their digests. digest: of a root that is
    made of these leaves, in hexadecimal: the tensor's, where they are all of its leaves.
    """

    first: int
    leaves: bytes
    digest: str


def hashed(pieces: Sequence[Leaves]) -> list[Hashed]:
    """All of the pieces."""
    leaves, of_each = memoryview(_hashed(pieces, depth=0)), []
    for piece in pieces:
        size = DIGEST_BYTES * count_leaves(len(piece.data))
        of_each.append(bytes(leaves[:size]))
        leaves = leaves[size:]
    roots = _hashed([Leaves(memoryview(each)) for each in of_each], depth=1)
    digests = (roots[i : i + DIGEST_BYTES].hex() for i in range(0, len(roots), DIGEST_BYTES))
    return [
        Hashed(piece.first, each, digest)
        for piece, each, digest in zip(pieces, of_each, digests, strict=True)
    ]


def hashed_in_pieces(pieces: Iterable[Leaves]) -> Hashed:
    """What comes in pieces, one after the other, whose memory may be used again for the next one.

    All of them but the last are some leaves long.
    """
    first, leaves = None, bytearray()
    for piece in pieces:
        first = piece.first if first is None else first
        leaves += _hashed([piece], depth=0)
    return Hashed(first or 0, bytes(leaves), root(leaves))


def root(leaves: bytes | bytearray) -> str:
    """The digest of a tensor with these leaves."""
    return _hashed([Leaves(memoryview(leaves))], depth=1).hex()


def count_leaves(nbytes: int) -> int:
    """Leaves of a tensor; an empty one has one."""
    return max(-(-nbytes // LEAF_BYTES), 1)


def _hashed(pieces: Sequence[Leaves], depth: int) -> bytes:
    """Digests of all leaves of the pieces (depth 0) or of a root for each (depth 1)."""
    counts = [1 if depth else count_leaves(len(piece.data)) for piece in pieces]
    found = library.blake2b(pieces, LEAF_BYTES, depth, sum(counts))
    return b"".join(_in_python(pieces, counts, depth)) if found is None else found


def _in_python(pieces: Sequence[Leaves], counts: Sequence[int], depth: int) -> Iterator[bytes]:
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
