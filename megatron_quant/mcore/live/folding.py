"""Fold factors into the weights of a live model, at any layout.

A place may be read by weights of many ranks. So a layer's statistics, norms and sampled rows are
shown to all ranks; these share the places, and every one then changes what it holds. Which rank
finds a place's factors, and how weights are cut, changes nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch

from megatron_quant.calib import Merged
from megatron_quant.dist import Groups, gather, together
from megatron_quant.folding import Fold, Place, fold_place, joined, sampled_rows
from megatron_quant.layers import QuantLayer
from megatron_quant.mcore.model import LiveModel, LocalParam
from megatron_quant.models import Copy, Domain, copies
from megatron_quant.recipes import Slot


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor's columns from ``start`` on; ``at`` are their places in the sample."""

    at: torch.Tensor
    start: int
    values: torch.Tensor


@dataclass(kw_only=True)
class _Shown:
    """The knowledge of a rank, or of all of them, of one layer, on the host.

    Attributes:
        squares, peaks: By slot name, fp32 [K].
        norms: By tensor, the stored weight.
        rows: By tensor, parts of the sampled rows.
        columns: By tensor, first column and largest magnitudes of some columns.
    """

    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    peaks: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, list[_Rows]] = field(default_factory=dict)
    columns: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)

    def add(self, other: "_Shown") -> None:
        self.squares |= other.squares
        self.peaks |= other.peaks
        self.norms |= other.norms
        for tensor, rows in other.rows.items():
            self.rows.setdefault(tensor, []).extend(rows)
        for tensor, columns in other.columns.items():
            self.columns.setdefault(tensor, []).extend(columns)


@dataclass(frozen=True)
class _Evidence:
    """The evidence that all ranks have shown of a layer."""

    shown: _Shown

    def squares(self, slot: Slot) -> torch.Tensor:
        return self.shown.squares[slot.name]

    def peaks(self, slot: Slot) -> torch.Tensor:
        return self.shown.peaks[slot.name]

    def norm(self, place: Place) -> torch.Tensor:
        return self.shown.norms[place.before[0]]

    def rows(self, place: Place, tensor: str) -> torch.Tensor:
        parts = self.shown.rows[tensor]
        shape = (len(sampled_rows(place, tensor)), place.after[tensor][1])
        whole = parts[0].values.new_empty(shape)
        for part in parts:
            whole[part.at, part.start : part.start + part.values.shape[1]] = part.values
        return whole

    def column_amax(self, place: Place, tensor: str) -> torch.Tensor:
        whole = torch.zeros(place.after[tensor][1])
        for start, found in self.shown.columns[tensor]:
            own = whole[start : start + len(found)]
            torch.maximum(own, found, out=own)
        return whole


@dataclass(frozen=True)
class LiveFolding:
    """Folds the factors of ``places`` into a live model's weights.

    Attributes:
        model: The model.
        layers: This rank's quantized layers.
        places: The places, equal on all ranks.
        dtype: Dtype in which the model's weights are exported.
    """

    model: LiveModel
    layers: Sequence[QuantLayer]
    places: Sequence[Place]
    dtype: torch.dtype

    def __call__(self, channels: Mapping[str, Merged]) -> Fold:
        """Change the weights, and return the factors of the whole model. Collective.

        Args:
            channels: Statistics of inputs by layer name.

        Raises:
            CalibrationError: On every rank, before any weight is changed, for statistics that are
                not finite.
        """
        groups, found = self.model.groups, list[Fold]()
        for _, of_layer in groupby(self.places, key=lambda place: place.layer):
            found.append(self._of_layer(list(of_layer), channels, groups))
        fold = joined(found)
        together(groups, lambda: self._apply(fold))
        return fold

    def _of_layer(
        self, places: Sequence[Place], channels: Mapping[str, Merged], groups: Groups
    ) -> Fold:
        shown = _Shown()
        for of_rank in gather(together(groups, lambda: self._show(places, channels)), groups):
            shown.add(of_rank)
        own = places[groups.rank :: groups.size]
        evidence = _Evidence(shown)
        found = together(groups, lambda: joined([fold_place(place, evidence) for place in own]))
        return joined(gather(found, groups))

    @torch.no_grad()
    def _show(self, places: Sequence[Place], channels: Mapping[str, Merged]) -> _Shown:
        shown = _Shown()
        wanted = {r.decision.slot.name for place in places for r in place.readers}
        for slot in wanted & self._by_slot.keys():
            layer, index = self._by_slot[slot]
            if self._is_first(layer.grouped):
                found = channels[layer.name]
                shown.squares[slot] = found.squares_EK[index].cpu()
                if found.peaks is not None:
                    shown.peaks[slot] = found.peaks[index].cpu()
        norms = {place.before[0] for place in places if place.norm}
        readers = {t: place for place in places for r in place.readers for t in r.tensors}
        for copy, held in self._held(places[0].layer):
            name = copy.source.name
            if name in norms:
                shown.norms[name] = held.to(self.dtype).cpu()
            elif name in readers:
                _show_weight(shown, readers[name], copy, held)
        return shown

    @cached_property
    def _by_slot(self) -> Mapping[str, tuple[QuantLayer, int]]:
        """Each of this rank's slots: its layer, and its place there."""
        return {
            decision.slot.name: (layer, index)
            for layer in self.layers
            for index, decision in enumerate(layer.decisions)
        }

    @cached_property
    def _by_layer(self) -> Mapping[int | None, Sequence[LocalParam]]:
        """This rank's parameters of each decoder layer."""
        found = defaultdict[int | None, list[LocalParam]](list)
        for local in self.model.local:
            found[local.param.layer].append(local)
        return found

    def _is_first(self, experts: bool) -> bool:
        """Return whether no rank before this one holds the same shards of such weights."""
        shards = self.model.groups.shards
        if shards is None or shards.replicas is None:
            return True
        replicas = shards.replicas
        return (replicas.experts if experts else replicas.dense).rank == 0

    def _held(self, layer: int) -> Iterator[tuple[Copy, torch.Tensor]]:
        """Yield what this rank shows of a layer's tensors."""
        for local in self._by_layer.get(layer, ()):
            if self._is_first(local.param.domain is Domain.EXPERT):
                tensor = self.model.tensor(local).detach()
                for copy in copies(local.param, local.shard_rank, local.shard_size):
                    yield copy, tensor[copy.dst.index]

    @torch.no_grad()
    def _apply(self, fold: Fold) -> None:
        for local in self.model.local:
            tensor = self.model.tensor(local).detach()
            for copy in copies(local.param, local.shard_rank, local.shard_size):
                if fold.changes(copy.source.name):
                    held = tensor[copy.dst.index]
                    held.copy_(fold.apply(copy.source.name, copy.src, held.to(self.dtype)))


def _show_weight(shown: _Shown, place: Place, copy: Copy, held: torch.Tensor) -> None:
    name, (row, start) = copy.source.name, copy.src.start
    if place.algorithm == "smoothquant":
        found = held.float().abs().amax(0).cpu()
        shown.columns.setdefault(name, []).append((start, found))
    elif place.alpha is None:
        rows = sampled_rows(place, name) - row
        at = ((rows >= 0) & (rows < copy.src.size[0])).nonzero().flatten()
        if len(at):
            values = held[rows[at].to(held.device)].cpu()
            shown.rows.setdefault(name, []).append(_Rows(at, start, values))
