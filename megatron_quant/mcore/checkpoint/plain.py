"""A training checkpoint without quantizers, as the Hugging Face checkpoint of the same model.

Loading, exporting and verifying then read it by Hugging Face names, slice by slice, as any other:
whatever the layout that saved it, and without a process group.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.dialects import without_quantization
from megatron_quant.ckpt.plan import digest_of, digest_of_parts
from megatron_quant.ckpt.read import Listed, TensorInfo
from megatron_quant.documents import check_regular
from megatron_quant.errors import CheckpointError
from megatron_quant.mcore.checkpoint.piece_reader import PieceReader
from megatron_quant.mcore.checkpoint.place import TENSORS
from megatron_quant.mcore.checkpoint.plain_check import check_plain_keys, prefix_of
from megatron_quant.mcore.checkpoint.plain_keys import Counts, KeyPlace, places_of
from megatron_quant.mcore.checkpoint.torch_dist import TorchDist
from megatron_quant.models import (
    Box,
    Param,
    copies,
    count_drafts,
    lookup,
    num_experts,
    num_layers,
    whole,
)

_OUTPUT, _TIED = "output_layer.weight", "tie_word_embeddings"
_DRAFT = re.compile(r"mtp\.layers\.(\d{1,4})\.")
_SAMPLE = 1 << 16
"""Bytes of each file that tell one iteration from another."""


@dataclass(frozen=True, slots=True)
class PlainRun:
    """``src`` of a Hugging Face tensor lies at ``start`` of the stored tensor ``key``."""

    src: Box
    key: str
    start: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PlainWeights(Listed):
    """The checkpoint's weights by Hugging Face names.

    path: of the Megatron checkpoint. config: the model's config.json, which says of the output
    layer what the checkpoint has. runs: of each tensor. shifts: what stored values are larger by,
    of tensors that Megatron has with another offset. digest: of what it holds.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    runs: Mapping[str, tuple[PlainRun, ...]] = field(repr=False)
    shifts: Mapping[str, float] = field(repr=False)
    reader: PieceReader = field(repr=False)
    digest: str

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of tensor ``name``, in its stored dtype; read nothing else."""
        stored = self._stored(name, box)
        if shift := self.shifts.get(name):
            return (stored.float() - shift).to(stored.dtype)
        return stored

    def _stored(self, name: str, box: Box) -> torch.Tensor:
        found: torch.Tensor | None = None
        for run in self.runs[name]:
            low = tuple(map(max, run.src.start, box.start))
            ends = zip(run.src.start, run.src.size, box.start, box.size, strict=True)
            size = tuple(min(a + n, b + m) - lo for (a, n, b, m), lo in zip(ends, low, strict=True))
            if min(size, default=1) <= 0:
                continue
            lead = len(run.start) - len(low)
            at = [o + lo - s for o, lo, s in zip(run.start[lead:], low, run.src.start, strict=True)]
            part = self.reader.read(run.key, (*run.start[:lead], *at), ((1,) * lead) + size)
            part = part.view(size) if lead else part
            if size == box.size:
                return part
            if found is None:
                found = torch.empty(box.size, dtype=part.dtype)
            inner = Box(tuple(lo - b for lo, b in zip(low, box.start, strict=True)), size)
            found[inner.index] = part
        assert found is not None, (name, box)
        return found


def open_plain(stored: TorchDist, hf_config: Mapping[str, Any]) -> PlainWeights:
    """Open ``stored`` as the model that config.json, ``hf_config``, describes.

    Raises CheckpointError where keys or shapes are not that model's, and say what is so.
    """
    config = without_quantization(hf_config)
    prefix = prefix_of(stored)
    if prefix + _OUTPUT in stored.shapes:
        config = {**config, _TIED: False}
    architecture = lookup(config)
    model = architecture.params(config)
    keys = {key.removeprefix(prefix) for key in stored.shapes if key.startswith(prefix)}
    params = architecture.with_drafts(config, _drafts_in(keys, config))
    counts = Counts(num_layers(model), num_experts(model))
    places = {param.name: places_of(param, counts, keys) for param in params}
    check_plain_keys(stored, prefix, params, places)
    tensors = stored.tensors(prefix + place.key for found in places.values() for place in found)
    infos: dict[str, TensorInfo] = {}
    runs: dict[str, tuple[PlainRun, ...]] = {}
    for param in params:
        for source in param.sources:
            runs[source.name] = tuple(_runs(param, source.name, places[param.name], prefix))
            dtype = tensors[runs[source.name][0].key].dtype
            infos[source.name] = TensorInfo(dtype, source.shape, TENSORS)
    return PlainWeights(
        path=stored.path,
        config=config,
        tensors=dict(sorted(infos.items())),
        runs=runs,
        shifts={s.name: p.shift for p in params if p.shift for s in p.sources},
        reader=PieceReader(stored.path, tensors),
        digest=_digest(stored, config),
    )


def _drafts_in(keys: Iterable[str], config: Mapping[str, Any]) -> int:
    """Count the layers for speculation; 0 where ``config`` does not say that the model has them."""
    numbers = [int(found[1]) for found in map(_DRAFT.match, keys) if found]
    return min(max(numbers, default=-1) + 1, count_drafts(config, ("mtp.",) if numbers else ()))


def _runs(param: Param, name: str, places: Iterable[KeyPlace], prefix: str) -> Iterator[PlainRun]:
    """Yield where the source ``name`` of ``param`` lies."""
    for place in places:
        key = prefix + place.key
        if place.part is None:
            for copy in copies(param, 0, 1):
                if copy.source.name == name:
                    top, *rest = copy.dst.start
                    top += param.inside.before if param.inside else 0
                    yield PlainRun(copy.src, key, (*place.lead, top, *rest))
        elif param.kept:
            yield from _kept_runs(param, name, place, key)
        elif param.sources[place.part].name == name:
            box = whole(param.sources[place.part].shape)
            yield PlainRun(box, key, (*place.lead, *box.start))


def _kept_runs(param: Param, name: str, place: KeyPlace, key: str) -> Iterator[PlainRun]:
    """Yield where rows of the source ``name`` lie among those of one item: in each group."""
    assert place.part is not None
    item = param.order[place.part]
    if param.sources[item.source].name != name:
        return
    rest = param.shape[1:]
    zeros = (0,) * len(rest)
    if item.count == item.stride:  # the groups follow one another in the source too
        box = Box((item.start, *zeros), (item.count * param.groups, *rest))
        yield PlainRun(box, key, (*place.lead, 0, *zeros))
        return
    for group in range(param.groups):
        box = Box((item.start + group * item.stride, *zeros), (item.count, *rest))
        yield PlainRun(box, key, (*place.lead, group * item.count, *zeros))


def _digest(stored: TorchDist, config: Mapping[str, Any]) -> str:
    """Digest config and keys, and of each file its size and what stands at its beginning."""
    keys = [[key, *shape] for key, shape in sorted(stored.shapes.items())]
    parts = [digest_of([dict(config), keys]).encode()]
    for file in sorted(stored.path.glob("*.distcp")):
        check_regular(file)
        try:
            with file.open("rb") as stream:
                parts += [str(file.stat().st_size).encode(), stream.read(_SAMPLE)]
        except OSError as e:
            raise CheckpointError(f"{file} cannot be read: {e.strerror}") from None
    return digest_of_parts(parts)
