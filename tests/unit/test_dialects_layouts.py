"""Transposed and packed tensors of every dialect: the same files whatever cuts the weight."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_quant.ckpt.dialects.registry import DIALECT_NAMES, get_dialect
from megatron_quant.ckpt.plan.proof import check_plan
from megatron_quant.ckpt.plan.sidecars import Companions
from megatron_quant.ckpt.write.directory import Existing, prepare_directory, publish
from megatron_quant.ckpt.write.encode_part import produce
from megatron_quant.ckpt.write.exporter import WriteOptions, read_digests, stage_documents
from megatron_quant.ckpt.write.rank_work import work_of, write_parts
from megatron_quant.errors import FormatError, LayoutError
from megatron_quant.formats.spec import CHANNEL, Format, get_format
from megatron_quant.models import Param
from tests.unit import crossing_world as world

CELLS = [
    ("gptq", get_format("int4", 32)),
    ("gptq", get_format("int4", 128)),
    ("gptq", get_format("int8_group", CHANNEL)),
    ("awq", get_format("int4", 64)),
    ("awq", get_format("int4_asym", 32)),
    ("awq", get_format("int4_asym", CHANNEL)),
    ("auto-round", get_format("int4", CHANNEL)),
    ("auto-round", get_format("int4_asym", 64)),
    ("auto-round", get_format("mxfp4")),
    ("compressed-tensors", get_format("int4_asym", 128)),
    ("compressed-tensors", get_format("int4", CHANNEL)),
    ("compressed-tensors", get_format("fp8_channel")),
    ("compressed-tensors", get_format("fp8_block")),
    ("modelopt", get_format("int4", 128)),
    ("modelopt", get_format("fp8_block")),
]
PARAMS = {
    "row": world.row(48, 768),
    "column": world.column(384, 64),
    "gate_up": world.gate_up(192, 96),
    "qkv": world.qkv(4, 8, 16, 96),
}


def written(param: Param, dialect: str, fmt: Format, size: int, directory: Path) -> world.Tensors:
    """What all ranks' files hold together."""
    plan = world.plan(param, fmt, size, get_dialect(dialect))
    check_plan(plan)
    weights = world.weights(param)
    held = world.shards(param, weights, fmt, size)
    amax = torch.stack([w.abs().amax() for w in weights.values()]).amax().float()

    def made(part):
        shard = next(s for s in held if part.region in s.regions)
        stat = shard.stats[shard.regions.index(part.region)]
        return produce(part, shard.local, amax, None, stat)

    beside = Companions(documents={})
    claim = prepare_directory(plan, directory, beside, Existing.REFUSE, size)
    for rank in range(size):
        write_parts(work_of(plan, rank), made, directory)
    digests = read_digests(plan.entries, directory, WriteOptions())
    stage_documents(plan, claim, beside, digests)
    publish(claim)
    claim.release()
    return load_file(directory / plan.files[0].name)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize(("dialect", "fmt"), CELLS, ids=lambda v: getattr(v, "name", v))
def test_files_are_equal_at_every_size(tmp_path, dialect, fmt, name):
    param = PARAMS[name]
    wanted = written(param, dialect, fmt, 1, tmp_path / "1")
    for size in (2, 4):
        found = written(param, dialect, fmt, size, tmp_path / str(size))
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].shape == tensor.shape, key
            assert torch.equal(bits(found[key]), bits(tensor)), (size, key)


@pytest.mark.parametrize(
    ("dialect", "fmt", "packed"),
    [
        ("awq", get_format("int4"), "qweight"),
        ("awq", get_format("int4_asym"), "qweight"),
        ("compressed-tensors", get_format("int4_asym"), "weight_zero_point"),
    ],
)
def test_shards_that_split_what_is_packed_along_rows(dialect, fmt, packed):
    param = world.column(24, 128)
    check_plan(world.plan(param, fmt, 3, get_dialect(dialect)))
    with pytest.raises(LayoutError, match=rf"--tp 2 cuts its 24 outputs among 8 that {packed}"):
        world.plan(param, fmt, 2, get_dialect(dialect))


def test_gptq_shards_may_cut_anywhere_along_rows():
    check_plan(world.plan(world.column(24, 128), get_format("int4"), 2, get_dialect("gptq")))


@pytest.mark.parametrize(
    ("dialect", "fmt", "rows", "packed"),
    [
        ("gptq", get_format("int4"), 8, "qzeros"),
        ("gptq", get_format("int8_group"), 4, "qzeros"),
        ("auto-round", get_format("int4"), 8, "qzeros"),
        ("awq", get_format("int4"), 8, "qzeros"),
        ("compressed-tensors", get_format("int4_asym"), 8, "weight_zero_point"),
    ],
)
def test_rows_that_do_not_fill_a_word(dialect, fmt, rows, packed):
    param = world.column(26, 128)
    message = f"its 26 outputs are not a multiple of {rows}, as {packed} packs"
    with pytest.raises(FormatError, match=message):
        world.plan(param, fmt, 1, get_dialect(dialect))


def test_every_dialect_is_cut() -> None:
    """But fp8: its one format goes with inputs, and is cut here in compressed-tensors.

    And those of single families: Megatron cuts no experts of gpt-oss, and has no DeepSeek-V4.
    """
    of_families = {"mxfp4", "deepseek-v4"}
    assert {dialect for dialect, _ in CELLS} == set(DIALECT_NAMES) - {"fp8", *of_families}
