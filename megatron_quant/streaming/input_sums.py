"""Sums of squares and products, and peaks, of the inputs of weights, in a file of each rank.

A weight's second moment, the sum of x x^T over the tokens that it was given, is as large as a
weight. So one decoder layer's are in memory at a time, and each rank's sums go to its file. Whoever
quantizes a weight adds up those of all ranks, in their order.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from megatron_quant.ckpt.storage import (
    DIGEST_BYTES,
    Draft,
    MappedFiles,
    TensorEntry,
    allocate,
    as_bytes,
    explained,
    lay_out,
    write_at,
)
from megatron_quant.formats import Format, fake_quant, tensor_scale
from megatron_quant.models import Param
from megatron_quant.recipes import Decision, QuantPlan, Slot

_SQUARES, _MOMENT, _PEAKS, _TOKENS = "squares", "moment", "peaks", "tokens"
_LOST = "lost"
_AT_ONCE = 4096
"""Tokens whose products are summed first and then added, whatever the size of a batch."""


class InputSums(Protocol):
    """Sums over the inputs of a slot, of the whole calibration text."""

    def squares(self, slot: Slot) -> torch.Tensor:
        """Return the sums of squares: fp32 [K]."""
        ...

    def moment(self, slot: Slot) -> torch.Tensor:
        """Return the sums of products: fp32 [K, K]."""
        ...

    def lost(self, decision: Decision) -> torch.Tensor:
        """Return the sums of (x - y) y^T, y what the codes of x stand for: fp32 [K, K]."""
        ...

    def peaks(self, slot: Slot) -> torch.Tensor:
        """Return the largest magnitudes of the channels: fp32 [K], 0 without tokens."""
        ...


def weighed_inputs(quant: QuantPlan, params: Sequence[Param]) -> list[Param]:
    """Return the parameters that are quantized by squares, products or peaks of their inputs."""
    return [p for p in params if quant.by_name[p.name].needs_channels]


def _shapes(decision: Decision) -> dict[str, tuple[int, ...]]:
    """Return the shape of each statistic that a slot needs."""
    cols = decision.slot.shape[1]
    shapes: dict[str, tuple[int, ...]] = {}
    if decision.needs_squares:
        shapes = {_MOMENT: (cols, cols)} if decision.rounds else {_SQUARES: (cols,)}
    if decision.serves_codes:
        shapes[_LOST] = (cols, cols)
    return shapes | ({_PEAKS: (cols,)} if decision.needs_peaks else {})


def sum_bytes(decision: Decision) -> int:
    """Return the bytes that the statistics of a slot take."""
    return 4 * sum(map(prod, _shapes(decision).values()))


@dataclass
class RunningSum:
    """The statistics of one weight's inputs so far.

    Attributes:
        found: By name, fp32: sums of products [K, K] or of squares [K], largest magnitudes [K].
        served: Format of the inputs' codes; None where what they lose is not summed.
        dscale: Scale of the whole tensor for these codes, fp32 [], if the format has one.
        tokens: Number of tokens that were not all zeros.
    """

    found: dict[str, torch.Tensor]
    served: Format | None = None
    dscale: torch.Tensor | None = None
    tokens: int = 0

    @classmethod
    def of(cls, decision: Decision, input_amax: torch.Tensor | None = None) -> "RunningSum":
        """Return what the slot needs, of no token yet.

        Args:
            decision: That on the slot.
            input_amax: Amax from which the scale of its inputs follows, fp32 []; needed where what
                they lose in codes is summed, and the codes have a scale of the whole tensor.
        """
        found = {name: torch.zeros(shape) for name, shape in _shapes(decision).items()}
        served, dscale = decision.inputs if decision.serves_codes else None, None
        if served is not None and served.tensor_scale:
            assert input_amax is not None, decision.slot.name
            dscale = tensor_scale(input_amax, served)
        return cls(found, served, dscale)

    def add(self, x: torch.Tensor) -> None:
        """Add inputs [..., T, K]."""
        for some_TK in x.reshape(-1, x.shape[-1]).split(_AT_ONCE):
            wide_TK = some_TK.float()
            for name, total in self.found.items():
                if name == _MOMENT:
                    total.addmm_(wide_TK.mT, wide_TK)
                elif name == _LOST:
                    assert self.served is not None, "as _shapes says"
                    served_TK = fake_quant(wide_TK, self.served, self.dscale)
                    total.addmm_((wide_TK - served_TK).mT, served_TK)
                elif name == _SQUARES:
                    total += wide_TK.square().sum(0)
                elif len(wide_TK):
                    torch.maximum(total, wide_TK.abs().amax(0), out=total)
            self.tokens += int((some_TK != 0).any(-1).sum())


class SumsFile:
    """A rank's sums, by slot, in a safetensors file; what was not put there is zero.

    Args:
        path: The file.
        decisions: Decisions on the slots.

    Attributes:
        entries: The place of each tensor, by name.
    """

    def __init__(self, path: Path, decisions: Sequence[Decision]) -> None:
        self.path, self.decisions, drafts = path, {d.slot.name: d for d in decisions}, []
        for d in decisions:
            name = d.slot.name
            for kind, shape in _shapes(d).items():
                drafts.append(Draft(f"{name}.{kind}", torch.float32, shape, 4 * prod(shape)))
            drafts.append(Draft(f"{name}.{_TOKENS}", torch.int64, (), 8))
        (self._file,) = lay_out([drafts], 1 << 62)
        self.entries = {e.name: replace(e, file=path.name) for e in self._file.entries}

    def create(self) -> None:
        """Make an empty file and claim its space. Raises ExportError for what the disk refuses."""
        with explained(self.path, f"cannot take {self._file.size} bytes"):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            fd = os.open(self.path, flags, 0o666)
            try:
                allocate(fd, self._file.size)
                write_at(fd, memoryview(self._file.header), 0)
            finally:
                os.close(fd)

    def put(self, sums: Mapping[str, RunningSum]) -> str:
        """Write sums by slot name; return their digest. Raises ExportError as the disk refuses."""
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        with explained(self.path, "cannot be written"):
            fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                for name, of_slot in sums.items():
                    values = (*of_slot.found.values(), torch.tensor(of_slot.tokens))
                    for entry, value in zip(self._of(name), values, strict=True):
                        data = as_bytes(value)
                        digest.update(data)
                        write_at(fd, data, entry.offset)
            finally:
                os.close(fd)
        return digest.hexdigest()

    def is_intact(self, names: Iterable[str], digest: str) -> bool:
        """Return whether the file holds what :meth:`put` gave ``digest`` for."""
        found = hashlib.blake2b(digest_size=DIGEST_BYTES)
        try:
            with self.path.open("rb") as stream:
                for entry in (entry for name in names for entry in self._of(name)):
                    stream.seek(entry.offset)
                    found.update(stream.read(entry.nbytes))
        except OSError:
            return False
        return found.hexdigest() == digest

    def _of(self, name: str) -> list[TensorEntry]:
        """Return the places of a slot's statistics and of its tokens."""
        return [
            self.entries[f"{name}.{kind}"] for kind in (*_shapes(self.decisions[name]), _TOKENS)
        ]


@dataclass
class MeasuredSums:
    """The sums of all ranks' files.

    Attributes:
        files: Each rank's.
    """

    files: Sequence[SumsFile]
    _pooled: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Map the files."""
        self._mapped = [MappedFiles(file.path.parent) for file in self.files]

    def squares(self, slot: Slot) -> torch.Tensor:
        """Return the sums of squares: fp32 [K]."""
        return self._of(slot, _SQUARES)

    def moment(self, slot: Slot) -> torch.Tensor:
        """Return the sums of products: fp32 [K, K]."""
        return self._of(slot, _MOMENT)

    def lost(self, decision: Decision) -> torch.Tensor:
        """Return the sums of (x - y) y^T, y what the codes of x stand for: fp32 [K, K]."""
        return self._of(decision.slot, _LOST)

    def peaks(self, slot: Slot) -> torch.Tensor:
        """Return the largest magnitudes of the channels: fp32 [K], 0 without tokens."""
        return torch.stack(list(self._each(f"{slot.name}.{_PEAKS}"))).amax(0)

    def tokens(self, slot: Slot) -> int:
        """Return the tokens that the slot was given."""
        return int(self._total(f"{slot.name}.{_TOKENS}"))

    def _of(self, slot: Slot, kind: str) -> torch.Tensor:
        """Return an expert's own sum, or its whole layer's where no token reached it."""
        if slot.expert is None or self.tokens(slot):
            return self._total(f"{slot.name}.{kind}")
        key = (slot.sharing, kind)
        if key not in self._pooled:
            if any(sharing != slot.sharing for sharing, _ in self._pooled):
                self._pooled.clear()  # one layer's are held
            slots = (d.slot for d in self.files[0].decisions.values())
            same = [other for other in slots if other.sharing == slot.sharing]
            total = self._total(f"{same[0].name}.{kind}")
            for other in same[1:]:
                total += self._total(f"{other.name}.{kind}")
            self._pooled[key] = total
        return self._pooled[key]

    def _total(self, name: str) -> torch.Tensor:
        return _sum(self._each(name))

    def _each(self, name: str) -> Iterator[torch.Tensor]:
        for file, mapped in zip(self.files, self._mapped, strict=True):
            with explained(file.path, "cannot be read"):
                yield mapped.tensor(file.entries[name])


def _sum(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """Add tensors up in their order."""
    total = next(parts).clone()
    for part in parts:
        total += part
    return total
