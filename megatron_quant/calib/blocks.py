"""Find the statistics of the blocks of weights, and merge those of blocks that shards cut.

A rank computes the statistics of all blocks that its weights touch. Where an edge between two
shards cuts a block, the rank has only a part of the values. It sends the statistics of these
blocks alone: one vector of all layers for each of the two groups of ranks that share tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.dist import Groups, max_reduce
from megatron_quant.formats import Edge, Region, block_stat, edge_of
from megatron_quant.layers import QuantLayer, set_block_amax

Reduce = Callable[[Tensor, Groups], Tensor]


@dataclass(frozen=True, eq=False)
class RegionStat:
    """The blocks that one region of a layer's weights touches.

    Attributes:
        layer: The layer.
        region: The region.
        edge: Blocks of it that shards cut; None where they cut none.
        stat: Statistics of all blocks, fp32 [E, N_b, K_b, P]; merging and searching overwrite them.
    """

    layer: QuantLayer
    region: Region
    edge: Edge | None
    stat: Tensor

    @property
    def origin(self) -> tuple[int, int]:
        """Return where the region starts in its tensor."""
        return self.region.start[0], self.region.start[1]


def stacked(layer: QuantLayer) -> Tensor:
    """Return the layer's weights as one stack, [E, N, K]; E is 1 for a dense one."""
    weights = [weight.detach() for weight in layer.weights()]
    return torch.stack(weights) if layer.grouped else weights[0].unsqueeze(0)


def is_cut(layer: QuantLayer) -> bool:
    """Return whether a shard cuts a block of the layer's weights."""
    return any(edge_of(region, layer.weight_format) for region in layer.regions)


def merged_blocks(layers: Sequence[QuantLayer], groups: Groups) -> list[RegionStat]:
    """Return the statistics of all blocks of ``layers``, equal to those of one rank with all.

    One collective for each group that cuts blocks of them; every rank of ``groups`` calls it.
    """
    held = [item for layer in layers for item in _own(layer)]
    cut = [(item, item.edge.pack(item.stat, 0.0)) for item in held if item.edge]
    for (item, _), merged in zip(cut, merge(cut, max_reduce, groups), strict=True):
        assert item.edge is not None
        item.edge.unpack(merged, item.stat)
    return held


def _own(layer: QuantLayer) -> Iterator[RegionStat]:
    fmt, w_ENK = layer.weight_format, stacked(layer)
    for region in layer.regions:
        origin = (region.start[0], region.start[1])
        stat = block_stat(region.take(w_ENK), fmt, origin)
        yield RegionStat(layer, region, edge_of(region, fmt), stat)


def merge(cut: Sequence[tuple[RegionStat, Tensor]], reduce: Reduce, groups: Groups) -> list[Tensor]:
    """Merge the results of :meth:`Edge.pack` over the ranks that hold the other shards.

    One collective for dense layers and one for experts, where there are any.

    Args:
        cut: Regions, each with the tensor to merge.
        reduce: The collective.
        groups: This rank's groups.
    """
    merged: list[Tensor] = [packed for _, packed in cut]
    for experts in (False, True):
        chosen = [i for i, (item, _) in enumerate(cut) if item.layer.grouped is experts]
        if chosen:
            flat = torch.cat([merged[i].flatten() for i in chosen])
            pieces = reduce(flat, shards_of(groups, experts)).split(
                [merged[i].numel() for i in chosen]
            )
            for i, piece in zip(chosen, pieces, strict=True):
                merged[i] = piece.view(merged[i].shape)
    return merged


def shards_of(groups: Groups, experts: bool) -> Groups:
    """Return the ranks that hold the other shards of this rank's dense or expert weights."""
    assert groups.shards is not None, "shards cut blocks, but who holds them is not known"
    return groups.shards.experts if experts else groups.shards.dense


def give(held: Sequence[RegionStat]) -> None:
    """Hand the statistics to the weight quantizers of their layers."""
    by_layer: dict[int, list[RegionStat]] = {}
    for item in held:
        by_layer.setdefault(id(item.layer), []).append(item)
    for items in by_layer.values():
        layer = items[0].layer
        stat = torch.cat([item.stat for item in items], dim=-3)
        set_block_amax(layer.weight_quantizer, stat if layer.grouped else stat[0])
