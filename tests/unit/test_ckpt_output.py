"""Files filled in place: the same bytes past the system's cache and through it."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
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
    with patch.object(direct_io, "_BLOCK", 1):
        assert filled(path, cut(data, [0, 3, len(data)])[1:], direct=True)[3:] == data[3:]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        OutputFile(tmp_path / "none", direct=True)
    assert not os.listdir(tmp_path)
