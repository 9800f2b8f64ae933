"""Place the tensors of an export in its files, by rules that no layout changes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from megatron_quant.ckpt.dialects import (
    Dialect,
    StackPlace,
    StorageScheme,
    StorageSchemes,
    layer_of,
)
from megatron_quant.ckpt.plan.cache_scales import cache_tensors
from megatron_quant.ckpt.plan.parts import ExpertPlace, StoredTensor
from megatron_quant.ckpt.plan.stacks import (
    Stack,
    drafts_of,
    grouped,
    places_of,
    single_entries,
    suffixes_of,
)
from megatron_quant.ckpt.storage import Draft, OutFile, TensorEntry, lay_out
from megatron_quant.errors import ExportError
from megatron_quant.models import Param, Source
from megatron_quant.recipes import Decision, QuantPlan


@dataclass(frozen=True, kw_only=True)
class StorageRules:
    """How the tensors of an export are stored, whatever is quantized and whoever holds it.

    Attributes:
        dialect: Dialect of the export.
        dtype: Dtype of all tensors that are not quantized.
        max_shard_bytes: Tensor bytes per file.
        kept: Hugging Face tensors that have another dtype where they are not quantized.
        stacked: Whether engines load the model's routed experts as stacks alone.

    Raises:
        ExportError: For a file size below 1 byte.
    """

    dialect: Dialect
    dtype: torch.dtype
    max_shard_bytes: int
    kept: Mapping[str, torch.dtype] = field(default_factory=dict)
    stacked: bool = False

    def __post_init__(self) -> None:
        """Refuse files without a byte."""
        if self.max_shard_bytes < 1:
            raise ExportError(
                f"--max-shard-size is {self.max_shard_bytes} bytes; give a positive size"
            )


_Wanted = tuple[Param, Source, StorageScheme]


def placed_in_files(
    params: Sequence[Param], quant: QuantPlan, rules: StorageRules
) -> tuple[tuple[OutFile, ...], tuple[StoredTensor, ...]]:
    """Lay out the files; a tensor stays in one, and so does a stack of experts.

    Args:
        params: The model's logical parameters, in order.
        quant: The resolved recipe.
        rules: How the tensors are stored.

    Raises:
        FormatError: Where a shape does not suit its format.
    """
    wanted = list(_wanted(params, quant, rules))
    stored = [(source, scheme) for _, source, scheme in wanted]
    places = places_of(stored, rules.dialect) if rules.stacked else {}
    drafts = [_drafts(source, scheme) for source, scheme in stored]
    units = grouped([source.name for source, _ in stored], places)
    of_unit = [_unit(members, stored, drafts, places) for members in units.values()]
    files = lay_out(of_unit, rules.max_shard_bytes)
    entry_of = {entry.name: entry for file in files for entry in file.entries}
    targets: dict[int, StoredTensor] = {}
    for members, unit in zip(units.values(), of_unit, strict=True):
        entries = tuple(entry_of[draft.name] for draft in unit)
        for i in members:
            targets[i] = _target(wanted[i], drafts[i], entries, places)
    return files, tuple(targets[i] for i in range(len(wanted)))


def _wanted(params: Sequence[Param], quant: QuantPlan, rules: StorageRules) -> Iterator[_Wanted]:
    fp32 = {s.name: torch.float32 for p in params if p.fp32 or p.wide for s in p.sources}
    schemes = StorageSchemes(rules.dialect, rules.dtype, {**fp32, **rules.kept})
    for param in params:
        decision = quant.by_name[param.name]
        for source in param.sources:
            yield param, source, _scheme(schemes, source, decision)
    yield from cache_tensors(quant, rules.dialect, params)


def _unit(
    members: Sequence[int],
    stored: Sequence[tuple[Source, StorageScheme]],
    drafts: Sequence[list[Draft]],
    places: Mapping[str, StackPlace],
) -> list[Draft]:
    """Return the file tensors of one tensor, or of a stack of ``members``."""
    if stored[members[0]][0].name not in places:
        return drafts[members[0]]
    return drafts_of([(places[stored[i][0].name], *stored[i]) for i in members])


def _target(
    wanted: _Wanted,
    drafts: Sequence[Draft],
    entries: tuple[TensorEntry, ...],
    places: Mapping[str, StackPlace],
) -> StoredTensor:
    param, source, scheme = wanted
    place = places.get(source.name)
    if place is None:
        return StoredTensor(param=param, source=source, scheme=scheme, entries=entries)
    stack = Stack(suffixes_of(place, scheme), entries)
    return StoredTensor(
        param=param,
        source=source,
        scheme=scheme,
        entries=tuple(single_entries(drafts, entries)),
        place=ExpertPlace(stack, place.expert, place.turn),
    )


def _scheme(schemes: StorageSchemes, source: Source, decision: Decision) -> StorageScheme:
    if decision.weights is None:
        return schemes.plain(source.name)
    return schemes.of(decision.weights, decision.inputs, layer_of(source.module))


def _drafts(source: Source, scheme: StorageScheme) -> list[Draft]:
    scheme.check_shape(source)
    described = zip(scheme.names(source), scheme.stored, scheme.shapes(source.shape), strict=True)
    return [
        Draft(name, stored.dtype, shape, prod(shape) * stored.dtype.itemsize)
        for name, stored, shape in described
    ]
