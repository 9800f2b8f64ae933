"""``mq.export_tensors``: the tensors of the files, without a disk, a bounded number at a time."""

import gc
import hashlib
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

import megatron_quant as mq
from megatron_quant.models import Pipeline
from tests.dist import checkpoints
from tests.dist.pool import Ranks
from tests.dist.test_live_models import stored_bytes

SIZES = {"num_experts": 4, "moe_intermediate_size": 128, "mlp_only_layers": [1]}
# (ranks, tp, ep, etp, pp)
LAYOUTS = [(1, 1, 1, 1, 1), (4, 2, 2, 1, 1), (2, 1, 1, 2, 1), (2, 1, 1, 1, 2)]
CASES = {
    "w4a16_nvfp4": ["modelopt", "compressed-tensors"],
    "int4": ["gptq", "auto-round", "compressed-tensors"],
    "int4_asym": ["awq"],
    "fp8_block": ["fp8"],
}
SMALL = 20_000
Told = tuple[str, str, tuple[int, ...], str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen3_moe", tmp_path_factory.mktemp("source"), **SIZES)


def live_model(source: Path, tp: int = 1, ep: int = 1, etp: int = 1, pp: int = 1) -> Any:
    from tests.dist import live

    return live.load(source, live.Parallelism(tp, ep, etp, Pipeline(pp))).chunks


def told(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Told]:
    """Name, dtype, shape and digest of each, in order; nothing is kept."""
    return [
        (n, str(t.dtype), tuple(t.shape), hashlib.blake2b(stored_bytes(t).numpy()).hexdigest())
        for n, t in tensors
    ]


def in_files(directory: Path) -> list[Told]:
    found = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found += told((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    return found


def write_files(source: Path, out: Path) -> dict[str, list[Told]]:
    """What the files of every dialect hold, written by one rank."""
    found = {}
    for recipe, dialects in CASES.items():
        handle = mq.quantize(live_model(source), recipe, hf_model=source)
        for dialect in dialects:
            mq.export(handle, out / f"{recipe}-{dialect}", format=dialect)
            found[f"{recipe}-{dialect}"] = in_files(out / f"{recipe}-{dialect}")
    return found


@pytest.fixture(scope="module")
def files(
    source: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks
) -> dict[str, list[Told]]:
    return ranks(1, write_files, source, tmp_path_factory.mktemp("files"))[0]


def stream_all(source: Path, *layout: int) -> dict[str, list[Told]]:
    found = {}
    for recipe, dialects in CASES.items():
        handle = mq.quantize(live_model(source, *layout), recipe, hf_model=source)
        for dialect in dialects:
            found[f"{recipe}-{dialect}"] = told(
                mq.export_tensors(handle, format=dialect, max_bytes=SMALL)
            )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_those_of_the_files_on_every_rank(
    layout: tuple[int, ...], source: Path, files: dict[str, list[Told]], ranks: Ranks
) -> None:
    first, *others = ranks(layout[0], stream_all, source, *layout[1:])
    for case, wanted in files.items():
        assert sorted(first[case]) == sorted(wanted), case
    assert all(list(other.items()) == list(first.items()) for other in others)  # in one order


class Traffic:
    """What this rank sends and receives by broadcast: bytes of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self._broadcast = dist.broadcast
        dist.broadcast = self

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(tensor.nbytes)
        return self._broadcast(tensor, *args, **kwargs)


def count_bytes(source: Path) -> tuple[int, list[int], int]:
    """Bytes of all tensors, those of each broadcast, and most bytes sent ahead of the reader."""
    handle = mq.quantize(live_model(source, 2, 2), "w4a16_nvfp4", hf_model=source)
    traffic, read, ahead = Traffic(), 0, 0
    before: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in mq.export_tensors(handle, max_bytes=SMALL):
        ahead = max(ahead, sum(traffic.calls) - read)
        read += tensor.nbytes
        gc.collect(0)
        assert [ref for ref in before if ref() is not None] == []  # a tensor lives till the next
        before = [weakref.ref(tensor)]
        del tensor
    return read, traffic.calls, ahead


def test_bytes_in_flight_are_bounded(source: Path, ranks: Ranks) -> None:
    """Every byte travels once, and a batch once the reader has taken the last one."""
    for read, calls, ahead in ranks(4, count_bytes, source):
        assert sum(calls) == read > 10 * SMALL
        half = 258 * 128  # bytes of each half of the embedding and of the head, which travel alone
        assert [size for size in calls if size > SMALL] == [half] * 4
        assert ahead <= 2 * half


def to_some(source: Path, to: tuple[int, ...]) -> list[Told]:
    handle = mq.quantize(live_model(source, 2, 2), "int4", hf_model=source)
    return told(mq.export_tensors(handle, format="gptq", ranks=to, max_bytes=SMALL))


@pytest.mark.parametrize("to", [(2,), (3, 0)])
def test_chosen_ranks_alone_get_tensors(
    to: tuple[int, ...], source: Path, files: dict[str, list[Told]], ranks: Ranks
) -> None:
    for rank, found in enumerate(ranks(4, to_some, source, to)):
        assert sorted(found) == (sorted(files["int4-gptq"]) if rank in to else [])


def in_another_dtype(source: Path, out: Path) -> tuple[list[Told], list[Told], str]:
    import json

    handle = mq.quantize(live_model(source), "w4a16_nvfp4", hf_model=source)
    mq.export(handle, out, dtype="fp32")
    config = json.loads((out / "config.json").read_text())
    streamed = told(mq.export_tensors(handle, dtype="fp32"))
    return streamed, in_files(out), config.get("dtype", config.get("torch_dtype"))


def test_dtype_is_that_of_what_is_not_quantized(
    source: Path, tmp_path: Path, files: dict[str, list[Told]], ranks: Ranks
) -> None:
    ((streamed, written, said),) = ranks(1, in_another_dtype, source, tmp_path / "out")
    assert sorted(streamed) == sorted(written) and said == "float32"
    dtypes = {name: dtype for name, dtype, _, _ in streamed}
    assert dtypes["model.norm.weight"] == dtypes["lm_head.weight"] == "torch.float32"
    codes = {told for told in written if told[1] == "torch.uint8"}
    assert codes and codes <= set(files["w4a16_nvfp4-modelopt"])


def refused(source: Path) -> list[str]:
    handle = mq.quantize(live_model(source, 2), "int4", hf_model=source)
    own = {"max_bytes": SMALL + dist.get_rank()}
    said = []
    for wrong in ({"ranks": (0, 2)}, {"ranks": (1, 1)}, {"dtype": "int8"}, own):
        try:
            list(mq.export_tensors(handle, **{"format": "gptq"} | wrong))
        except mq.QuantError as e:
            said.append(str(e))
    return said


def test_wrong_arguments_are_refused_on_every_rank(source: Path, ranks: Ranks) -> None:
    said = [
        "ranks=[0, 2]: give each of the model's ranks, 0 to 1, once at most",
        "ranks=[1, 1]: give each of the model's ranks, 0 to 1, once at most",
        "dtype='int8': give one of bf16, fp16, fp32",
        "the ranks would not do the same: max bytes is 20000 on rank 0, 20001 on rank 1; give all "
        "hosts the same flags and files",
    ]
    assert ranks(2, refused, source) == [said] * 2


@torch.no_grad()
def trained(chunks: Any) -> Any:
    """Other weights, as a step of training leaves them."""
    for weight in chunks[0].parameters():
        weight.mul_(1.25)
    return chunks


def refit_transformers(source: Path, out: Path) -> list[torch.Tensor]:
    """Logits of what transformers loads: the first export, the refit, and the second export."""
    from transformers import AutoConfig, Qwen3MoeForCausalLM

    chunks = live_model(source)
    handle = mq.quantize(chunks, "fp8_channel", hf_model=source)
    dialect = "compressed-tensors"
    mq.export(handle, out / "first", format=dialect)
    mq.update(trained(chunks))
    mq.export(chunks, out / "second", format=dialect)
    tensors = dict(mq.export_tensors(chunks, format=dialect))
    config = AutoConfig.from_pretrained(out / "first")
    load = Qwen3MoeForCausalLM.from_pretrained
    models = [
        load(out / "first", dtype=torch.bfloat16),
        load(None, config=config, state_dict=tensors, dtype=torch.bfloat16),
        load(out / "second", dtype=torch.bfloat16),
    ]
    ids = torch.arange(32)[None]
    return [model.eval()(ids).logits.detach() for model in models]


def test_transformers_model_takes_the_tensors(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    ((first, refit, second),) = ranks(1, refit_transformers, source, tmp_path)
    assert torch.equal(refit, second) and not torch.equal(refit, first)
