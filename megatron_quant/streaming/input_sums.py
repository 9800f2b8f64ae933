"""Sums of squares and products of the inputs of weights, kept in a file of each rank.

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
from megatron_quant.models import Param
from megatron_quant.recipes import Decision, QuantPlan, Slot

_SQUARES, _MOMENT, _TOKENS = "squares", "moment", "tokens"
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


def weighed_inputs(quant: QuantPlan, params: Sequence[Param]) -> list[Param]:
    """Return the parameters that are quantized by squares or products of their inputs."""
    decisions = quant.by_name
    return [p for p in params if (d := decisions[p.name]).quantized and (d.weighted or d.rounds)]


def sum_bytes(decision: Decision) -> int:
    """Return the bytes that the sums of a slot take."""
    cols = decision.slot.shape[1]
    return 4 * (cols * cols if decision.rounds else cols)


@dataclass
class RunningSum:
    """The sum of one weight's inputs so far.

    Attributes:
        total: fp32 [K, K] of products, or [K] of squares.
        tokens: Number of tokens that were not all zeros.
    """

    total: torch.Tensor
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Add inputs [..., T, K]."""
        for some_TK in x.reshape(-1, x.shape[-1]).split(_AT_ONCE):
            wide_TK = some_TK.float()
            if self.total.dim() == 2:
                self.total.addmm_(wide_TK.mT, wide_TK)
            else:
                self.total += wide_TK.square().sum(0)
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
            cols, name = d.slot.shape[1], d.slot.name
            shape, kind = ((cols, cols), _MOMENT) if d.rounds else ((cols,), _SQUARES)
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
                for name, found in sums.items():
                    values = (found.total, torch.tensor(found.tokens))
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

    def _of(self, name: str) -> tuple[TensorEntry, TensorEntry]:
        """Return the places of a slot's sums and of its tokens."""
        kind = _MOMENT if self.decisions[name].rounds else _SQUARES
        return self.entries[f"{name}.{kind}"], self.entries[f"{name}.{_TOKENS}"]


@dataclass
class MeasuredSums:
    """The sums of all ranks' files.

    Attributes:
        files: Each rank's.
    """

    files: Sequence[SumsFile]
    _pooled: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Map the files."""
        self._mapped = [MappedFiles(file.path.parent) for file in self.files]

    def squares(self, slot: Slot) -> torch.Tensor:
        """Return the sums of squares: fp32 [K]."""
        return self._of(slot, _SQUARES)

    def moment(self, slot: Slot) -> torch.Tensor:
        """Return the sums of products: fp32 [K, K]."""
        return self._of(slot, _MOMENT)

    def tokens(self, slot: Slot) -> int:
        """Return the tokens that the slot was given."""
        return int(self._total(f"{slot.name}.{_TOKENS}"))

    def _of(self, slot: Slot, kind: str) -> torch.Tensor:
        """Return an expert's own sum, or its whole layer's where no token reached it."""
        if slot.expert is None or self.tokens(slot):
            return self._total(f"{slot.name}.{kind}")
        if slot.sharing not in self._pooled:
            self._pooled.clear()  # one layer's is held
            slots = (d.slot for d in self.files[0].decisions.values())
            same = [other for other in slots if other.sharing == slot.sharing]
            total = self._total(f"{same[0].name}.{kind}")
            for other in same[1:]:
                total += self._total(f"{other.name}.{kind}")
            self._pooled[slot.sharing] = total
        return self._pooled[slot.sharing]

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
