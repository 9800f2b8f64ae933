"""Find scales of least error, over all the weights that share them, whoever holds those.

Ranks merge sums of squared errors, which ``formats.search`` counts in integers. So the choice is
equal, bit for bit, however the weights are cut. Its result is a statistic: the amax of a tensor, or
``_block_amax``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_quant.calib.blocks import RegionStat, give, is_cut, merge, merged_blocks, stacked
from megatron_quant.calib.search_tensors import search_tensors
from megatron_quant.dist import Groups, sum_reduce
from megatron_quant.formats import (
    FOUR_OVER_SIX_RANGE,
    MULTIPLIERS,
    SearchedPiece,
    choose,
    errors,
    tensor_scale,
)
from megatron_quant.layers import QuantLayer
from megatron_quant.recipes import QuantPlan
from megatron_quant.rounding import importance

_ERRORS_AT_ONCE = 1 << 23
"""Errors (one for each block and multiplier, 8 bytes) that are held at a time."""


Squares = Mapping[str, Tensor]
"""Layer name -> sums of squares of the inputs of each of its weights, fp32 [E, K], all of K."""
_UNKNOWN: Squares = MappingProxyType({})


def find_scales(layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups) -> None:
    """Find the parts of weights' scales that go beyond amaxes, which the quantizers have.

    They are searched scales, and statistics of blocks that shards cut. A constant number of
    collectives; every rank of ``groups`` calls it.
    """
    find_tensor_scales(layers, plan, groups)
    find_block_scales(layers, groups)


def find_tensor_scales(layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups) -> None:
    """Find searched scales of tensors, which several layers may share."""
    widen(layers)
    search_tensors(layers, plan, groups)


def find_block_scales(
    layers: Sequence[QuantLayer], groups: Groups, squares: Squares = _UNKNOWN
) -> None:
    """Find the statistics of blocks that are searched, cut by shards, or kept. Collective.

    Args:
        layers: The layers, in one order on all ranks that hold shards of them.
        groups: This rank's groups.
        squares: Weights of columns; a layer that is missing has equal ones.
    """
    static = [layer for layer in layers if is_cut(layer) or layer.keeps_blocks]
    blocks = merged_blocks(static, groups)
    search_blocks(blocks, groups, squares)
    give(blocks)


def follow_weights(layers: Sequence[QuantLayer], groups: Groups) -> None:
    """Refresh the statistics of blocks that shards cut, in layers whose scales nothing searches.

    A constant number of collectives; every rank of ``groups`` calls it.
    """
    give(merged_blocks([x for x in layers if is_cut(x) and not x.keeps_blocks], groups))


def widen(layers: Iterable[QuantLayer]) -> None:
    """Widen the range of tensors with blocks that may map to 4 of 6, whose block scales need it."""
    for layer in layers:
        if layer.decisions[0].algorithm == "four_over_six":
            quantizer = layer.weight_quantizer
            quantizer.amax = quantizer.amax * FOUR_OVER_SIX_RANGE


def search_blocks(held: Sequence[RegionStat], groups: Groups, squares: Squares = _UNKNOWN) -> None:
    """Replace, in place, the merged statistics of blocks by those of least error.

    Layers that search nothing keep theirs. One collective for each group that cuts blocks; every
    rank of ``groups`` calls it. Tensors have their amaxes already.
    """
    found = [
        _search(item, squares.get(item.layer.name)) for item in held if item.layer.searches_blocks
    ]
    cut = [(best, best.sums) for best in found if best.sums is not None]
    merged = merge([(best.item, sums) for best, sums in cut], sum_reduce, groups)
    for (best, _), sums in zip(cut, merged, strict=True):
        best.decide(sums)
    for best in found:
        best.item.stat.mul_(best.multiplier.unsqueeze(-1))


def _tried(layer: QuantLayer) -> Sequence[float]:
    return MULTIPLIERS[layer.decisions[0].search]


@dataclass(frozen=True, eq=False)
class _Best:
    """The result of a search.

    Attributes:
        item: The blocks.
        multiplier: Factor on the statistic of each block, fp32 [E, N_b, K_b]. Blocks that shards
            cut get theirs from :meth:`decide`.
        sums: This shard's errors of the cut blocks, packed, int64 [E, N_b, K_b, M]; None where
            shards cut none.
    """

    item: RegionStat
    multiplier: Tensor
    sums: Tensor | None

    def decide(self, merged: Tensor) -> None:
        """Choose for the blocks that shards cut, by the errors of all their shards."""
        assert self.item.edge is not None
        chosen = choose(merged.movedim(-1, 0), _tried(self.item.layer))
        self.item.edge.unpack(chosen, self.multiplier)


def _search(item: RegionStat, squares_EK: Tensor | None) -> _Best:
    layer, fmt, edge, tried = item.layer, item.layer.weight_format, item.edge, _tried(item.layer)
    w_ENK = item.region.take(stacked(layer))
    dscale = tensor_scale(layer.amax_of_stack(), fmt) if fmt.tensor_scale else None
    weight = None if squares_EK is None else _weight(item, squares_EK)
    multiplier, packed = item.stat.new_empty(item.stat.shape[:-1]), []
    for blocks, rows, row in _chunks(item, len(tried)):
        origin, stat = (row, item.region.start[1]), item.stat[:, blocks].contiguous()
        sums = errors(w_ENK[:, rows], fmt, dscale, stat, tried, SearchedPiece(origin, weight))
        multiplier[:, blocks] = choose(sums, tried)
        if edge is not None:
            packed.append(edge.pack(sums.movedim(0, -1), 0))
    return _Best(item, multiplier, torch.cat(packed, 1) if packed else None)


def _weight(item: RegionStat, squares_EK: Tensor) -> Tensor:
    """Return the weights of the region's columns: [E, K]."""
    names, fmt = [d.slot.name for d in item.layer.decisions], item.layer.weight_format
    first, size = item.region.start[1], item.region.size[1]
    rows = zip(squares_EK, names, strict=True)
    return torch.stack([importance(one, fmt, name)[first : first + size] for one, name in rows])


def _chunks(item: RegionStat, tried: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield rows of blocks, the held rows that they touch, and the first of these in the tensor."""
    block = item.layer.weight_format.stat_block
    assert block is not None
    experts, count, columns, _ = item.stat.shape
    step = max(1, _ERRORS_AT_ONCE // (experts * columns * tried))
    if item.edge is not None and item.edge.dim == 0:
        step = count  # blocks of many rows: there are few
    (start, _), (size, _) = item.region.start, item.region.size
    first = item.region.touched(block)[0].start
    for low in range(0, count, step):
        high = min(low + step, count)
        rows = slice(
            max((first + low) * block[0] - start, 0), min((first + high) * block[0] - start, size)
        )
        yield slice(low, high), rows, start + rows.start
