"""A search finds the same scales, bit for bit, however the weights are cut."""

import pytest
import torch

from megatron_quant.ckpt.plan.shards import regions
from megatron_quant.formats import block_stat, get_format, tensor_scale
from megatron_quant.formats.blocks.region import edge_of
from megatron_quant.formats.search import (
    FOUR_OVER_SIX,
    MSE_MULTIPLIERS,
    SearchedPiece,
    choose,
    errors,
)
from megatron_quant.formats.spec import CHANNEL, Format
from megatron_quant.models import Param
from tests.unit import crossing_world as world

FORMATS = [
    *(get_format("int4", g) for g in (32, 128, CHANNEL)),
    *map(get_format, ("int4_asym", "int8", "fp8_channel", "fp8_block", "nvfp4")),
]
SIZES = (2, 3, 4, 8)


def name(fmt: Format) -> str:
    return f"{fmt.name}-{fmt.group_size}"


def tried(fmt: Format) -> tuple[float, ...]:
    return FOUR_OVER_SIX if fmt.name == "nvfp4" else (1.0, 0.95, 0.9, 0.7, 1.05)


def scale(weights: world.Tensors, fmt: Format) -> torch.Tensor | None:
    amax = torch.stack([w.abs().amax() for w in weights.values()]).amax().float()
    return tensor_scale(amax, fmt) if fmt.tensor_scale else None


def found_by_shards(param: Param, weights: world.Tensors, fmt: Format, size: int) -> list:
    """For every shard and region of it (region, chosen multipliers)."""
    held, dscale = world.shards(param, weights, fmt, size), scale(weights, fmt)
    chosen = []
    for index in range(len(param.sources)):
        edges, sums = [], []
        for shard in held:
            region = shard.regions[index]
            w, stat = region.take(shard.local), shard.stats[index]
            if stat is None:
                stat = block_stat(w, fmt, region.start)
            edges.append(edge_of(region, fmt))
            own = errors(w, fmt, dscale, stat, tried(fmt), SearchedPiece(region.start))
            sums.append(own.movedim(0, -1)[None])  # [1, N_b, K_b, M], as the ranks pack it
        if edges[0] is not None:
            merged = sum(edge.pack(own, 0) for edge, own in zip(edges, sums, strict=True))
            for edge, own in zip(edges, sums, strict=True):
                edge.unpack(merged, own)
        for shard, own in zip(held, sums, strict=True):
            chosen.append((shard.regions[index], index, choose(own[0].movedim(-1, 0), tried(fmt))))
    return chosen


@pytest.mark.parametrize("fmt", FORMATS, ids=name)
@pytest.mark.parametrize(
    "param", [world.row(130, 768), world.gate_up(264, 96)], ids=["row", "fused"]
)
def test_shards_choose_what_the_whole_chooses(fmt: Format, param: Param) -> None:
    weights = world.weights(param)
    whole = []
    for source in param.sources:
        w = weights[source.name]
        stat = block_stat(w, fmt)
        whole.append(choose(errors(w, fmt, scale(weights, fmt), stat, tried(fmt)), tried(fmt)))
    assert any(len(chosen.unique()) > 1 for chosen in whole), "nothing to choose"
    for size in SIZES:
        for region, index, chosen in found_by_shards(param, weights, fmt, size):
            rows, cols = region.touched(fmt.stat_block)
            expected = whole[index][rows.start : rows.stop, cols.start : cols.stop]
            assert torch.equal(chosen, expected), (size, region)


def test_tensor_scales_are_chosen_by_the_sum_of_all_shards() -> None:
    param, fmt = world.row(64, 768), get_format("fp8")
    (w,) = world.weights(param).values()
    amax = w.abs().amax().float()
    expected = errors(w, fmt, None, amax, MSE_MULTIPLIERS)
    for size in SIZES:
        held = world.shards(param, {param.sources[0].name: w}, fmt, size)
        sums = sum(errors(shard.local, fmt, None, amax, MSE_MULTIPLIERS) for shard in held)
        assert torch.equal(sums, expected)


def test_regions_of_replicas_are_whole() -> None:
    param = world.row(8, 32)
    ((source, region),) = regions(param, 0, 1)
    assert source is param.sources[0]
    assert region.cut((1, 0)) == ((), ())
