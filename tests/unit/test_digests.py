"""Digests of many messages at once: each is hashlib's of it alone, with the library and without."""

import hashlib
import random
from unittest.mock import patch

import pytest

from megatron_quant.ckpt.runs import DIGEST_BYTES, digests
from megatron_quant.formats import native

EDGES = [0, 1, 7, 8, 127, 128, 129, 255, 256, 257, 1000]


def messages(count: int, seed: int) -> list[memoryview]:
    rng = random.Random(seed)
    sizes = [rng.choice([*EDGES, rng.randrange(5000)]) for _ in range(count)]
    return [memoryview(rng.randbytes(size)) for size in sizes]


def expected(given: list[memoryview]) -> list[str]:
    return [hashlib.blake2b(m, digest_size=DIGEST_BYTES).hexdigest() for m in given]


@pytest.mark.skipif(not native.blake2b([memoryview(b"x")], 32), reason="built without a compiler")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 40])
def test_four_at_a_time(count: int) -> None:
    for seed in range(20):
        given = messages(count, seed)
        found = native.blake2b(given, DIGEST_BYTES)
        assert found is not None and [each.hex() for each in found] == expected(given)


@pytest.mark.skipif(not native.blake2b([memoryview(b"x")], 32), reason="built without a compiler")
@pytest.mark.parametrize("size", [8, 32, 64])
def test_other_lengths_of_digests(size: int) -> None:
    given = messages(6, 0)
    wanted = [hashlib.blake2b(m, digest_size=size).digest() for m in given]
    assert native.blake2b(given, size) == wanted


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_with_the_library_or_without(count: int) -> None:
    given = messages(count, count)
    assert digests(given) == expected(given)
    with patch.object(native, "_library", return_value=None):
        assert digests(given) == expected(given)
