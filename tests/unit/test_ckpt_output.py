"""Files filled in place have the same bytes past the system's cache and through it."""

import fcntl
import os
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from megatron_quant.ckpt.storage import direct_io
from megatron_quant.ckpt.storage.direct_io import OutputFile, Run, StagingBuffer
from megatron_quant.ckpt.storage.disk import allocate


def made(path: Path, size: int) -> Path:
    with path.open("wb") as stream:
        allocate(stream.fileno(), size)
    return path


def cut(data: bytes, edges: list[int]) -> list[Run]:
    """Runs of ``data`` between neighbouring edges."""
    return [(a, memoryview(data)[a:b]) for a, b in pairwise(edges)]


def filled(path: Path, runs: list[Run], direct: bool) -> bytes:
    out = OutputFile(path, direct)
    try:
        out.write(runs, StagingBuffer())
        out.sync()
    finally:
        out.close()
    return path.read_bytes()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_runs_of_all_lengths(tmp_path: Path, seed: int, direct: bool) -> None:
    """Adjacent ones and gaps; shorter than a block and longer than a stage."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 7, 4096, 5000, 300_000, 5_000_000]) for _ in range(12)]
    edges = [0]
    for length in [rng.randrange(9000), *lengths]:
        edges.append(edges[-1] + length)
    data = rng.randbytes(edges[-1] + 100)
    runs = cut(data, edges)
    kept = [run for run in runs if rng.random() < 0.8]
    expected = bytearray(len(data))
    for offset, part in kept:
        expected[offset : offset + len(part)] = part
    assert filled(made(tmp_path / "file", len(data)), kept, direct) == expected


def test_neighbours_keep_what_others_write(tmp_path: Path) -> None:
    """Threads whose runs share blocks at their edges."""
    data = random.Random(0).randbytes(8_000_000)
    runs = cut(data, [*range(0, len(data), 777_777), len(data)])
    out = OutputFile(made(tmp_path / "file", len(data)), direct=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda run: out.write([run], StagingBuffer()), runs))
    out.close()
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_system_that_refuses_such_writes(tmp_path: Path) -> None:
    """Blocks of one byte are what no file system takes past its cache."""
    data = random.Random(1).randbytes(1_000_001)
    path = made(tmp_path / "file", len(data))
    with patch.object(direct_io, "block_of", lambda fd: 1):
        assert filled(path, cut(data, [0, 3, len(data)])[1:], direct=True)[3:] == data[3:]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OutputFile(tmp_path / "none", direct=True)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("block", [4096, 16384, 65536])
def test_larger_blocks(block: int, tmp_path: Path) -> None:
    """As pages of 16 and 64 KB ask for: each write past the cache is of whole blocks."""
    data = random.Random(2).randbytes(9_000_001)
    path, seen, real = made(tmp_path / "file", len(data)), [], direct_io.write_at

    def write_at(fd: int, part: memoryview, offset: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            seen.append((offset, len(part)))
        real(fd, part, offset)

    with (
        patch.object(direct_io, "block_of", lambda fd: block),
        patch.object(direct_io, "write_at", write_at),
    ):
        assert filled(path, cut(data, [5, len(data)]), direct=True)[5:] == data[5:]
    assert len(seen) == 3  # a file system of the test's that takes such writes
    assert all(offset % block == length % block == 0 for offset, length in seen)


# Words of struct statx: what a kernel says, or what one before 6.1 leaves.
SAID = {
    (0x2000, 4, 512): 4096,
    (0x2000, 16384, 65536): 65536,
    (0x2000, 0, 0): 0,
    (0x2000, 4, 1 << 21): 0,
    (0, 0, 0): 4096,
}


@pytest.mark.parametrize(("said", "block"), SAID.items())
def test_the_block_is_what_the_file_system_says(said: tuple[int, int, int], block: int) -> None:
    def statx(fd: int, path: bytes, flags: int, mask: int, found: Any) -> int:
        assert (path, flags, mask) == (b"", 0x1000, 0x2000)
        found[0], found[38], found[39] = said
        return 0

    with (
        patch.object(direct_io.ctypes, "CDLL", lambda name: SimpleNamespace(statx=statx)),
        patch.object(direct_io, "PAGESIZE", 4096),
    ):
        assert direct_io.block_of(0) == block


def test_pages_count_where_no_system_says() -> None:
    with (
        patch.object(direct_io.ctypes, "CDLL", lambda name: SimpleNamespace()),
        patch.object(direct_io, "PAGESIZE", 65536),
    ):
        assert direct_io.block_of(0) == 65536
