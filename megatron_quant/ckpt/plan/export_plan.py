"""The export as a value: every tensor of every file, and which rank writes which part of it."""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from megatron_quant.ckpt.plan.parts import RankPart, StoredTensor, box_of
from megatron_quant.ckpt.plan.placing import StorageRules, placed_in_files
from megatron_quant.ckpt.plan.ranks import Layout
from megatron_quant.ckpt.plan.shards import regions
from megatron_quant.ckpt.storage import OutFile, TensorEntry
from megatron_quant.errors import LayoutError
from megatron_quant.formats import Region
from megatron_quant.models import Domain, Param
from megatron_quant.recipes import QuantPlan


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything about an export but the tensors' values.

    ``files``, and the entries in them, do not depend on the layout; ``parts`` do.

    Attributes:
        files: Files in order.
        targets: Hugging Face tensors in the order of the model.
        parts: Rectangles of them, one owner each.
        bytes_before: Bytes of the weights if none were quantized.
        bytes_after: Bytes of the weights on disk.
    """

    files: tuple[OutFile, ...]
    targets: tuple[StoredTensor, ...]
    parts: tuple[RankPart, ...]
    bytes_before: int
    bytes_after: int

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Return every tensor, file by file."""
        return tuple(entry for file in self.files for entry in file.entries)

    @property
    def index(self) -> dict[str, Any]:
        """Return the content of ``model.safetensors.index.json``."""
        return {
            "metadata": {"total_size": self.bytes_after},
            "weight_map": {entry.name: entry.file for entry in self.entries},
        }

    @cached_property
    def _by_rank(self) -> dict[int, tuple[RankPart, ...]]:
        parts: dict[int, list[RankPart]] = {}
        for part in self.parts:
            parts.setdefault(part.owner, []).append(part)
        return {rank: tuple(found) for rank, found in parts.items()}

    def parts_of(self, rank: int) -> tuple[RankPart, ...]:
        """Return the parts that ``rank`` writes, in the order of the model."""
        return self._by_rank.get(rank, ())


def plan_export(
    params: Sequence[Param], quant: QuantPlan, layout: Layout, rules: StorageRules
) -> ExportPlan:
    """Plan the files of ``params``, quantized by ``quant`` and stored by ``rules``.

    Args:
        params: The model's logical parameters, in order.
        quant: The resolved recipe.
        layout: Ranks that hold the model.
        rules: How the tensors are stored.

    Raises:
        FormatError: Where a shape does not suit its format.
        LayoutError: Where a shard's edge splits elements that are stored together.
    """
    files, targets = placed_in_files(params, quant, rules)
    before = sum(prod(source.shape) for p in params for source in p.sources) * rules.dtype.itemsize
    after = sum(entry.nbytes for file in files for entry in file.entries)
    return ExportPlan(
        files=files,
        targets=targets,
        parts=_own(_rectangles(targets, layout)),
        bytes_before=before,
        bytes_after=after,
    )


_Held = tuple[StoredTensor, Region, tuple[int, ...]]


def _rectangles(targets: Sequence[StoredTensor], layout: Layout) -> Iterator[_Held]:
    """Yield every rectangle of every target with the ranks that hold it, in the model's order."""
    by_param: dict[str, dict[str, StoredTensor]] = {}
    for target in targets:
        by_param.setdefault(target.param.name, {})[target.source.name] = target
    for of_source in by_param.values():
        param = next(iter(of_source.values())).param
        holders = layout.holders(param)
        for shard, ranks in enumerate(holders):
            for source, region in regions(param, shard, len(holders)):
                target = of_source[source.name]
                _check_split(target, region, len(holders))
                yield target, region, ranks


def _check_split(target: StoredTensor, region: Region, size: int) -> None:
    weights = target.scheme.weights
    if weights is not None and weights.stat_block is not None:
        region.cut(weights.stat_block)
    found = target.scheme.split(target.source.shape, box_of(region))
    if found is None:
        return
    axis = "tp" if target.param.domain is Domain.DENSE else "etp"
    what = ("outputs", "inputs")[found.dim]
    raise LayoutError(
        f"{target.source.name}: --{axis} {size} cuts its {target.source.shape[found.dim]} {what}"
        f" among {found.count} that {found.suffix} stores in one element; choose another --{axis},"
        " or exclude the weight"
    )


_Ranks = tuple[int, ...]


def _own(rectangles: Iterator[_Held]) -> tuple[RankPart, ...]:
    """Choose one owner per rectangle: largest first, to the holder with the fewest bytes so far.

    The shards of a tensor that are cut along its inputs go to one replica's ranks together. These
    can then put its rows together among them.
    """
    found = list(rectangles)
    sizes = [t.scheme.nbytes(t.source.shape, box_of(region)) for t, region, _ in found]
    owners = [0] * len(found)
    load: dict[int, int] = defaultdict(int)
    heaps: dict[tuple[_Ranks, ...], list[tuple[int, _Ranks]]] = {}
    for unit in sorted(_units(found), key=lambda unit: -max(sizes[i] for i in unit)):
        holders = tuple(found[i][2] for i in unit)
        if holders not in heaps:
            heaps[holders] = [(0, ranks) for ranks in zip(*holders, strict=True)]
        for i, rank in zip(unit, _lightest(heaps[holders], load), strict=True):
            owners[i] = rank
            load[rank] += sizes[i]
    return tuple(
        RankPart(t, region, own) for (t, region, _), own in zip(found, owners, strict=True)
    )


def _units(found: Sequence[_Held]) -> list[list[int]]:
    """Group the rectangles whose owners are chosen together."""
    units: dict[object, list[int]] = {}
    for i, (target, region, _) in enumerate(found):
        key: object = i
        if target.place is not None:
            key = (target.place.stack.entries[0].name, target.place.expert)
        elif cut_inside(region):
            key = target
        units.setdefault(key, []).append(i)
    return list(units.values())


def cut_inside(region: Region) -> bool:
    """Return whether the region has a part of each row of its tensor."""
    return region.size[1:] != region.whole[1:]


def _lightest(heap: list[tuple[int, _Ranks]], load: dict[int, int]) -> _Ranks:
    """Return the ranks of least load; loads in the heap may be outdated, but only too small."""
    while heap[0][0] != (now := max(load[rank] for rank in heap[0][1])):
        heapq.heapreplace(heap, (now, heap[0][1]))
    return heap[0][1]
