"""Weights whose blocks shards cut, with every rank of a layout in one process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_quant.ckpt.dialects.base import Layer, Stored
from megatron_quant.ckpt.plan.export_plan import ExportPlan, plan_export
from megatron_quant.ckpt.plan.parts import RankPart
from megatron_quant.ckpt.plan.placing import StorageRules
from megatron_quant.ckpt.plan.quantizable import slots
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.ckpt.plan.shards import regions
from megatron_quant.ckpt.write.encode_part import produce
from megatron_quant.formats import block_stat
from megatron_quant.formats.blocks.region import Region, edge_of
from megatron_quant.formats.spec import Format
from megatron_quant.models import Parallel, Param, Role, Source, copies, local_shape
from megatron_quant.recipes.plan import Decision, QuantPlan

Tensors = dict[str, torch.Tensor]


class Raw:
    """A dialect that stores every field of the codec as it is."""

    name = "raw"

    def stored(self, weights: Format, inputs: Format | None, layer: Layer) -> tuple[Stored, ...]:
        return tuple(
            Stored(suffix=f.name, field=f.name, dtype=f.dtype, block=f.block)
            for f in weights.fields
        )


def row(rows: int, inner: int) -> Param:
    """Row-parallel: shards cut its ``inner`` columns."""
    return _param("down", [(rows, inner)], Parallel.ROW)


def column(inner: int, cols: int) -> Param:
    return _param("up", [(inner, cols)], Parallel.COLUMN)


def gate_up(inner: int, cols: int) -> Param:
    return _param("gate_up", [(inner, cols), (inner, cols)], Parallel.COLUMN)


def qkv(query_groups: int, heads: int, head_dim: int, cols: int) -> Param:
    q, kv = (heads * head_dim, cols), (query_groups * head_dim, cols)
    return _param("qkv", [q, kv, kv], Parallel.COLUMN, query_groups)


def _param(name: str, shapes: list[tuple[int, int]], parallel: Parallel, groups: int = 0) -> Param:
    sources = tuple(Source(f"{name}.{i}.weight", shape) for i, shape in enumerate(shapes))
    whole = (sum(n for n, _ in shapes), shapes[0][1])
    return Param(
        name=f"{name}.weight",
        sources=sources,
        shape=whole,
        role=Role.LINEAR,
        parallel=parallel,
        groups=groups,
    )


def weights(param: Param, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Hugging Face tensors by name; their magnitudes grow along rows and columns."""
    rng = torch.Generator().manual_seed(len(param.name) + param.shape[1])
    found = {}
    for source in param.sources:
        rows, cols = source.shape
        rise = torch.linspace(0.5, 3, rows)[:, None] * torch.linspace(0.2, 2, cols)
        found[source.name] = (torch.randn(rows, cols, generator=rng) * rise).to(dtype)
    return found


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a parameter. ``stats``: of each region, as merged."""

    local: torch.Tensor
    regions: tuple[Region, ...]
    stats: list[torch.Tensor | None]


def shards(param: Param, whole: Tensors, fmt: Format, size: int) -> list[Shard]:
    """Every rank's shard, its blocks' statistics merged where shards cut them."""
    held = [_held(param, whole, rank, size) for rank in range(size)]
    found = [Shard(local, found, [None] * len(found)) for local, found in held]
    if fmt.stat_block is not None:
        for index in range(len(param.sources)):
            _merge(found, index, fmt)
    return found


def _held(
    param: Param, whole: Tensors, rank: int, size: int
) -> tuple[torch.Tensor, tuple[Region, ...]]:
    local = torch.zeros(local_shape(param, rank, size), dtype=next(iter(whole.values())).dtype)
    for copy in copies(param, rank, size):
        local[copy.dst.index] = whole[copy.source.name][copy.src.index]
    return local, tuple(region for _, region in regions(param, rank, size))


def _merge(held: list[Shard], index: int, fmt: Format) -> None:
    edges = [edge_of(shard.regions[index], fmt) for shard in held]
    if edges[0] is None:
        assert edges == [None] * len(held)
        return
    found = []
    for shard in held:
        region = shard.regions[index]
        found.append(block_stat(region.take(shard.local)[None], fmt, region.start))
    packed = [edge.pack(stat, 0.0) for edge, stat in zip(edges, found, strict=True)]
    merged = torch.stack(packed).amax(0)
    for shard, edge, stat in zip(held, edges, found, strict=True):
        edge.unpack(merged, stat)
        shard.stats[index] = stat[0]


def plan(param: Param, fmt: Format, size: int, dialect: Any = None) -> ExportPlan:
    """The export at ``size`` ranks, of the codec's fields or in a dialect."""
    decisions = tuple(Decision(slot=slot, rule="test", weights=fmt) for slot in slots((param,)))
    quant = QuantPlan("crossing", decisions)
    layout = Layout.simulate(size, size, 1, 1)
    return plan_export(
        (param,),
        quant,
        layout,
        StorageRules(
            dialect=dialect or Raw(),
            dtype=torch.bfloat16,
            max_shard_bytes=10**9,
        ),
    )


def export(param: Param, whole: Tensors, fmt: Format, size: int) -> Tensors:
    """The tensors on disk, put together of what all ranks write; no element is written twice."""
    made, held = plan(param, fmt, size), shards(param, whole, fmt, size)
    found = {e.name: torch.zeros(e.shape, dtype=e.dtype) for e in made.entries}
    times = {e.name: torch.zeros(e.shape, dtype=torch.int32) for e in made.entries}
    amax = torch.stack([w.abs().amax() for w in whole.values()]).amax().float()
    for part in made.parts:
        for entry, box, value in _produced(part, held, amax):
            found[entry.name][box.index] = value
            times[entry.name][box.index] += 1
    assert all((count == 1).all() for count in times.values())
    return found


def _produced(part: RankPart, held: list[Shard], amax: torch.Tensor) -> Iterator:
    shard = next(s for s in held if part.region in s.regions)
    stat = shard.stats[shard.regions.index(part.region)]
    return produce(part, shard.local, amax, None, stat)
