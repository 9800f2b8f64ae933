"""Work that one rank of each host does for all: calls, results, errors."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_quant.alike import ids_once_a_host, once_a_host
from megatron_quant.calib.data import Document, load_texts
from megatron_quant.dist import Groups
from megatron_quant.errors import CalibrationError
from megatron_quant.runs import agree, batches
from megatron_quant.runs.options import QuantizeOptions
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_layouts import export_all
from tests.dist.test_stream import stream_case

# Local ranks of three hosts, of which the last has one rank.
LOCAL = ("0", "1", "2", "0", "1", "0")
FIRSTS = [0, 0, 0, 3, 3, 5]


def _of_host(failing: int) -> tuple[int, list[list[int]], str]:
    """Calls of the work; what came of it, as lists; what the other kind of work gave."""
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = LOCAL[rank]
    calls = []

    def work() -> list[torch.Tensor]:
        calls.append(rank)
        if rank == failing:
            raise CalibrationError(f"rank {rank} has no text")
        return [torch.full((2, 3), rank), torch.full((rank,), 7), torch.arange(4).view(2, 2).t()]

    found = ids_once_a_host(Groups(), work)
    said = once_a_host(Groups(), lambda: f"by {rank}")
    assert all(ids.dtype == torch.int64 for ids in found)
    return len(calls), [ids.tolist() for ids in found], said


def test_ids_are_those_of_the_first_rank_of_the_host(ranks: Ranks) -> None:
    for rank, (calls, ids, said) in enumerate(ranks(6, _of_host, -1)):
        first = FIRSTS[rank]
        assert calls == (rank == first)
        assert ids == [[[first] * 3] * 2, [7] * first, [[0, 2], [1, 3]]]
        assert said == f"by {first}"


@pytest.mark.parametrize("failing", [0, 3, 5])
def test_an_error_on_one_host_is_that_of_all(failing: int, ranks: Ranks) -> None:
    for error in ranks.errors(6, _of_host, failing):
        assert isinstance(error, CalibrationError)
        assert str(error) == f"rank {failing} has no text"


def _nothing() -> list[torch.Tensor]:
    return ids_once_a_host(Groups(), list)


def test_no_ids_at_all(ranks: Ranks) -> None:
    assert ranks(2, _nothing) == [[], []]


def _reads(stream: bool, source: Path, out: Path) -> list[str]:
    """Texts that this rank reads, in a run of ranks on one host that calibrates."""
    read: list[str] = []

    def counted(spec: str) -> list[Document]:
        read.append(spec)
        return load_texts(spec)

    batches.load_texts = counted
    case = {"export_quant_cfg": "fp8", "export_format": "compressed-tensors"}
    case["calib_dataset"] = __file__
    if stream:
        few = {"calib_size": 2, "calib_seq_length": 16}
        stream_case(source, out, {**case, **few})
    else:
        export_all(source, out, 2, 1, 1, [case])
    return read


@pytest.mark.parametrize("stream", [False, True], ids=["live", "stream"])
def test_one_rank_of_a_host_tokenizes(stream: bool, tmp_path: Path, ranks: Ranks) -> None:
    source = checkpoints.save("qwen3", tmp_path / "source")
    assert ranks(2, _reads, stream, source, tmp_path / "out") == [[__file__], []]


def _fetched(source: Path) -> int:
    """How often this rank asks the hub."""
    count = 0

    def resolved(_: str, code: bool = False, weights: bool = True) -> Path:
        nonlocal count
        count += 1
        return source

    agree.resolve_source = resolved
    options = QuantizeOptions.from_flags(hf_model_id="owner/name", export_quant_cfg="fp8")
    assert agree.fetched(options, Groups()).hf_model_id == str(source)
    return count


def test_one_rank_of_a_host_asks_the_hub(tmp_path: Path, ranks: Ranks) -> None:
    assert ranks(3, _fetched, tmp_path) == [1, 0, 0]
