"""Digest a tensor's bytes: BLAKE2b-256 in the tree mode of its specification.

A tensor is cut into leaves of 64 KiB. Its digest is that of the root, which is made of the leaves'
digests. So several ranks can hash leaves, and one rank hashes many side by side, several times
faster than one after the other. ``hashlib.blake2b`` gives equal digests with ``fanout=0, depth=2,
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

    Attributes:
        first: Number of the first of these leaves.
        leaves: Their digests.
        digest: Digest of a root made of these leaves, in hexadecimal. It is the tensor's where they
            are all of its leaves.
    """

    first: int
    leaves: bytes
    digest: str


def hashed(pieces: Sequence[Leaves]) -> list[Hashed]:
    """Hash all of the pieces."""
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
    """Hash pieces that come one after the other and may share one memory.

    All of them but the last are some whole leaves long.
    """
    first, leaves = None, bytearray()
    for piece in pieces:
        first = piece.first if first is None else first
        leaves += _hashed([piece], depth=0)
    return Hashed(first or 0, bytes(leaves), root(leaves))


def root(leaves: bytes | bytearray) -> str:
    """Return the digest of a tensor with these leaves."""
    return _hashed([Leaves(memoryview(leaves))], depth=1).hex()


def count_leaves(nbytes: int) -> int:
    """Count the leaves of a tensor; an empty one has one."""
    return max(-(-nbytes // LEAF_BYTES), 1)


def _hashed(pieces: Sequence[Leaves], depth: int) -> bytes:
    """Return digests of all leaves of the pieces (depth 0) or of a root for each (depth 1)."""
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
