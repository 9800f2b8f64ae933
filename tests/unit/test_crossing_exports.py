"""Blocks belong to the logical tensor: every cut writes the same bytes."""

import pytest
import torch

from megatron_quant.errors import CalibrationError, LayoutError
from megatron_quant.formats import encode, get_format, tensor_scale
from megatron_quant.formats.spec import CHANNEL, Format
from megatron_quant.models import Param
from tests.unit import crossing_world as world

FORMATS = [
    *(get_format(name, g) for name in ("int4", "int4_asym") for g in (32, 64, 128, CHANNEL)),
    get_format("int8_group", 128),
    *map(get_format, ("fp8", "fp8_channel", "fp8_block", "int8", "nvfp4", "mxfp8", "mxfp4")),
]
SIZES = (2, 3, 4, 8)


def name(fmt: Format) -> str:
    return f"{fmt.name}-{fmt.group_size}"


def assert_same(found: world.Tensors, expected: world.Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[key], tensor)]
        assert torch.equal(*raw), key


def whole(param: Param, weights: world.Tensors, fmt: Format) -> world.Tensors:
    """What each whole tensor encodes to."""
    dscale = None
    if fmt.tensor_scale:
        amax = torch.stack([w.abs().amax() for w in weights.values()]).amax().float()
        dscale = tensor_scale(amax, fmt)
    return {
        f"{key.removesuffix('.weight')}.{field}": value
        for key, w in weights.items()
        for field, value in encode(w, fmt, dscale).items()
    }


def splits(param: Param, fmt: Format, size: int) -> bool:
    """Whether shards of a row-parallel parameter cut packed elements."""
    return param.shape[1] // size % fmt.fields[0].block[1] != 0


@pytest.mark.parametrize("inner", [704, 768, 96, 1056, 2880])
@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_row_parallel(fmt: Format, inner: int) -> None:
    param = world.row(130, inner)
    weights = world.weights(param)
    expected = whole(param, weights, fmt)
    assert_same(world.export(param, weights, fmt, 1), expected)
    for size in SIZES:
        if inner % size:
            continue
        if splits(param, fmt, size):
            with pytest.raises(LayoutError, match=f"--tp {size} cuts its {inner} inputs among"):
                world.plan(param, fmt, size)
        else:
            assert_same(world.export(param, weights, fmt, size), expected)


@pytest.mark.parametrize("inner", [704, 768, 96, 264])
@pytest.mark.parametrize("fmt", FORMATS, ids=name)
def test_column_parallel_and_fused(fmt: Format, inner: int) -> None:
    for param in (world.column(inner, 160), world.gate_up(inner, 160)):
        weights = world.weights(param)
        expected = whole(param, weights, fmt)
        for size in (1, *SIZES):
            if inner % size == 0:
                assert_same(world.export(param, weights, fmt, size), expected)


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
@pytest.mark.parametrize(("query_groups", "heads", "head_dim"), [(8, 16, 24), (8, 8, 80)])
def test_query_key_value(fmt: Format, query_groups: int, heads: int, head_dim: int) -> None:
    param = world.qkv(query_groups, heads, head_dim, 96)
    weights = world.weights(param)
    expected = whole(param, weights, fmt)
    for size in (1, 2, 4, 8):
        assert_same(world.export(param, weights, fmt, size), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    param = world.row(64, 704)
    weights = world.weights(param, dtype)
    for fmt in FORMATS:
        expected = whole(param, weights, fmt)
        assert_same(world.export(param, weights, fmt, 4), expected)


def test_a_group_of_several_shards() -> None:
    """A shard that lies inside one group: some ranks write none of its scales."""
    param, fmt = world.row(8, 256), get_format("int4", 128)
    weights = world.weights(param)
    plan = world.plan(param, fmt, 8)
    writers = [part.owner for part in plan.parts if len(list(part.pieces)) == 2]
    assert writers == [0, 4]
    assert_same(world.export(param, weights, fmt, 8), whole(param, weights, fmt))


def test_cut_blocks_need_merged_statistics() -> None:
    param, fmt = world.row(8, 96), get_format("int4", 64)
    part = world.plan(param, fmt, 2).parts[0]
    shard = world.shards(param, world.weights(param), fmt, 2)[0]
    with pytest.raises(CalibrationError, match=r"down\.0\.weight: shards cut its int4 blocks"):
        list(world.produce(part, shard.local))
