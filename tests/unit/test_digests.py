"""Digests of tensors: each is the tree that hashlib makes, with the library and without it."""

import hashlib
import os
import random
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_quant.ckpt.storage.box_bytes import hashed_on_disk, leaves_of
from megatron_quant.ckpt.storage.safetensors_header import TensorEntry
from megatron_quant.ckpt.storage.tensor_digests import TensorDigests
from megatron_quant.ckpt.storage.tree_digest import hashed, hashed_in_pieces
from megatron_quant.models.spec import Box, whole
from megatron_quant.native import library
from megatron_quant.native.library import Leaves

LEAF = 65536
EDGES = [0, 1, 127, 128, 129, 256, 1000, LEAF - 1, LEAF, LEAF + 1, 3 * LEAF, 5 * LEAF + 128]


def tree(message: bytes) -> str:
    """BLAKE2b-256 of two levels, as hashlib's documentation shows it."""
    shared = {"digest_size": 32, "fanout": 0, "depth": 2, "leaf_size": LEAF, "inner_size": 32}
    starts = range(0, max(len(message), 1), LEAF)
    root = hashlib.blake2b(**shared, node_depth=1, last_node=True)
    for i, start in enumerate(starts):
        leaf = message[start : start + LEAF]
        last = i == len(starts) - 1
        root.update(hashlib.blake2b(leaf, **shared, node_offset=i, last_node=last).digest())
    return root.hexdigest()


def messages(count: int, seed: int) -> list[memoryview]:
    rng = random.Random(seed)
    sizes = [rng.choice([*EDGES, rng.randrange(3 * LEAF)]) for _ in range(count)]
    return [memoryview(rng.randbytes(size)) for size in sizes]


def digests(given: list[memoryview]) -> list[str]:
    return [found.digest for found in hashed([Leaves(message) for message in given])]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9, 30])
def test_with_the_library_and_without(count: int) -> None:
    given = messages(count, count)
    expected = [tree(bytes(message)) for message in given]
    assert digests(given) == expected
    with patch.object(library, "_library", return_value=None):
        assert digests(given) == expected


@pytest.mark.skipif(not library.available(), reason="built without a compiler")
def test_many_short_ones_beside_a_long_one() -> None:
    given = [memoryview(bytes(10 * LEAF)), *messages(3, 0), memoryview(b"x" * 100)] * 3
    assert digests(given) == [tree(bytes(message)) for message in given]


@pytest.mark.parametrize("size", EDGES)
def test_in_pieces(size: int) -> None:
    message = random.Random(size).randbytes(size)
    for step in (LEAF, 2 * LEAF, 8 * LEAF):
        starts = range(0, max(size, 1), step)
        pieces = (
            Leaves(memoryview(message)[at : at + step], at // LEAF, at + step >= size)
            for at in starts
        )
        assert hashed_in_pieces(pieces).digest == tree(message)


def test_on_disk_whatever_runs_it_lies_in(tmp_path: Path) -> None:
    """Rows of 300 bytes of which a box has 100: read together, up to many leaves."""
    data = random.Random(0).randbytes(8 + 60000 * 300)
    (tmp_path / "file").write_bytes(data)
    entry = TensorEntry(
        name="t", dtype=torch.uint8, shape=(60000, 300), file="file", offset=8, nbytes=len(data) - 8
    )
    columns = Box((1, 200), (59998, 100))
    later = TensorEntry(
        name="t", dtype=torch.uint8, shape=(60000, 300), file="file", offset=9, nbytes=len(data) - 8
    )
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        found = [hashed_on_disk(fd, entry, box) for box in (whole(entry.shape), columns)]
        assert hashed_on_disk(fd, later, whole(later.shape)) is None
    finally:
        os.close(fd)
    rows = (data[8 + 300 * r + 200 :][:100] for r in range(1, 59999))
    expected = [tree(data[8:]), tree(b"".join(rows))]
    assert [each and each.digest for each in found] == expected


ROWS = {"leaves": [0, 128, 384, 1000], "cut": [0, 128, 321, 1000]}
"""Of 512 bytes each: edges between leaves, and one that is none."""


@pytest.mark.parametrize("known", ROWS)
def test_of_parts_that_several_write(tmp_path: Path, known: str) -> None:
    """Their leaves make the tensor's digest, in memory and on disk; columns and cut leaves none."""
    data = random.Random(2).randbytes(1000 * 512)
    (tmp_path / "file").write_bytes(data)
    entry = TensorEntry(
        name="t", dtype=torch.uint8, shape=(1000, 512), file="file", offset=0, nbytes=len(data)
    )
    boxes = [Box((a, 0), (b - a, 512)) for a, b in pairwise(ROWS[known])]
    ranks = [TensorDigests() for _ in boxes]
    with (tmp_path / "file").open("rb") as stream:
        for rank, box in zip(ranks, boxes, strict=True):
            part = memoryview(data)[box.start[0] * 512 :][: box.size[0] * 512]
            (found,) = hashed([leaves_of(entry, box, part)])
            assert hashed_on_disk(stream.fileno(), entry, box) == found
            rank.add([(entry, box, found)])
    merged = TensorDigests()
    for rank in reversed(ranks):
        assert not rank.complete and not merged.complete
        merged.merge(rank, {"t": entry})
    assert merged.complete == ({"t": tree(data)} if known == "leaves" else {})
    columns = Box((0, 0), (1000, 256))
    found = hashed([leaves_of(entry, columns, memoryview(data)[: 1000 * 256])])[0]
    merged.add(
        [
            (entry, columns, found),
            (entry, whole(entry.shape), hashed([Leaves(memoryview(data))])[0]),
        ]
    )
    assert merged.complete == {"t": tree(data)}
