"""A checkpoint as engines will decode its export, for layers that measure inputs behind others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_quant.ckpt.read import Weights, Wrapped
from megatron_quant.ckpt.storage import MappedFiles, TensorEntry
from megatron_quant.dist import Groups, Meetings
from megatron_quant.models import Box, whole
from megatron_quant.streaming.states import StatesFile
from megatron_quant.streaming.workplace import Workplace

Values = Callable[[str, torch.Tensor], torch.Tensor]
"""(a tensor's name, its values) -> its values once it is quantized."""


@dataclass(frozen=True)
class QuantizedWeights(Wrapped):
    """Weights whose quantized tensors are read with the values that their codes stand for.

    Attributes:
        slots: The slot of each quantized tensor, by name.
        values: Called with whole tensors, as they are needed.
    """

    slots: Mapping[str, str]
    values: Values

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of a tensor as its export is decoded."""
        if name not in self.slots:
            return self.source.read(name, box)
        return self.whole(name)[box.index]

    def whole(self, name: str) -> torch.Tensor:
        """Read all of a tensor as its export is decoded."""
        info = self.info(name)
        assert info is not None, name
        return self.values(name, self.source.read(name, whole(info.shape)))


@dataclass(frozen=True)
class _Kept(Wrapped):
    """Weights of which some lie in files of ranks."""

    entries: Mapping[str, TensorEntry]
    files: MappedFiles

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read ``box`` of a tensor."""
        entry = self.entries.get(name)
        return self.source.read(name, box) if entry is None else self.files.tensor(entry)[box.index]


@dataclass(frozen=True, kw_only=True)
class RoundedLayers:
    """Layers with the values that their codes stand for; the ranks round a share of each.

    Attributes:
        weights: The checkpoint with these values, made as they are read.
        dtype: Their dtype.
        place: Where ranks keep what they have rounded.
        groups: This rank's groups.
        meetings: Where the ranks wait for one another.
    """

    weights: QuantizedWeights
    dtype: torch.dtype
    place: Workplace
    groups: Groups
    meetings: Meetings

    def first(self, layer: int) -> int:
        """Return the first layer that any rank has to run. Collective.

        Args:
            layer: The first one of this rank.
        """
        return min(self.meetings.meet(layer))

    def of(self, names: Iterable[str]) -> Weights:
        """Return the checkpoint with a layer's rounded weights. Collective.

        It waits until every rank has put its sums of the layer's inputs.

        Args:
            names: The layer's tensors.

        Raises:
            ExportError: On every rank, for what the disk refuses.
        """
        if self.groups.size == 1:
            return self.weights
        self.meetings.meet(None)
        shares = self._shares(names)
        files = [self._file(rank, share) for rank, share in enumerate(shares)]
        own = files[self.groups.rank]
        own.path.unlink(missing_ok=True)  # not overwritten: what others read of it stays
        own.write(self.weights.whole(name).to(self.dtype) for name in shares[self.groups.rank])
        self.meetings.meet(None)
        entries = {
            name: entry
            for share, file in zip(shares, files, strict=True)
            for name, entry in zip(share, file.entries, strict=True)
        }
        return _Kept(self.weights.source, entries, MappedFiles(own.path.parent))

    def _shares(self, names: Iterable[str]) -> list[list[str]]:
        """Deal the quantized tensors out to the ranks; those of a slot share a factor."""
        slots = self.weights.slots
        changed = [name for name in names if name in slots]
        place = {slot: i for i, slot in enumerate(dict.fromkeys(slots[n] for n in changed))}
        size = self.groups.size
        return [[n for n in changed if place[slots[n]] % size == rank] for rank in range(size)]

    def _file(self, rank: int, share: Sequence[str]) -> StatesFile:
        infos = [self.weights.dense()[name] for name in share]
        return StatesFile(self.place.rounded(rank), [info.shape for info in infos], self.dtype)
