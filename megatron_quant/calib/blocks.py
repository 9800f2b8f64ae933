"""Statistics of the blocks of weights: of those that shards cut, merged over these shards.

A rank computes the statistics of all blocks that its weights touch. Of those that an edge between
two shards cuts it has only a part of the values; it sends these alone, of all layers in one vector
for each of the two groups of ranks among which tensors are cut.
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

    edge: those of them that shards cut; None where they cut none.
    stat: their statistics, fp32 [E, N_b, K_b, P], overwritten as they are merged and searched.
    """

    layer: QuantLayer
    region: Region
    edge: Edge | None
    stat: Tensor

    @property
    def origin(self) -> tuple[int, int]:
        """Where the region starts in its tensor."""
        return self.region.start[0], self.region.start[1]


def stacked(layer: QuantLayer) -> Tensor:
    """The layer's weights as one stack, [E, N, K]; E is 1 for a dense one."""
    weights = [weight.detach() for weight in layer.weights()]
    return torch.stack(weights) if layer.grouped else weights[0].unsqueeze(0)


def is_cut(layer: QuantLayer) -> bool:
    """Whether a shard cuts a block of the layer's weights."""
    return any(edge_of(region, layer.weight_format) for region in layer.regions)


def merged_blocks(layers: Sequence[QuantLayer], groups: Groups) -> list[RegionStat]:
    """The statistics of all blocks of ``layers``, as a rank that has whole tensors finds them.

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
    """Merge what :meth:`Edge.pack` made over the ranks that hold the other shards.

    One collective for dense layers and one for experts, where there are any.
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
    """The ranks that hold the other shards of this rank's dense weights, or of its experts'."""
    assert groups.shards is not None, "shards cut blocks, but who holds them is not known"
    return groups.shards.experts if experts else groups.shards.dense


def give(held: Sequence[RegionStat]) -> None:
    """Give the statistics to the weight quantizers of their layers."""
    by_layer: dict[int, list[RegionStat]] = {}
    for item in held:
        by_layer.setdefault(id(item.layer), []).append(item)
    for items in by_layer.values():
        layer = items[0].layer
        stat = torch.cat([item.stat for item in items], dim=-3)
        set_block_amax(layer.weight_quantizer, stat if layer.grouped else stat[0])
