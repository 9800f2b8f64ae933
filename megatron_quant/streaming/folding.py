"""Find the factors of a checkpoint's places, and what they do to statistics of inputs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_quant.ckpt.read import row_blocks
from megatron_quant.dist import Groups, gather, together
from megatron_quant.folding import Fold, Place, fold_place, joined, sampled_rows
from megatron_quant.models import Box
from megatron_quant.recipes import Decision, QuantPlan, Slot, largest_shared
from megatron_quant.streaming.input_sums import InputSums
from megatron_quant.streaming.inputs import InputAmaxes
from megatron_quant.streaming.part_source import PartSource


def find_fold(
    source: PartSource,
    kept: Mapping[str, torch.dtype],
    places: Sequence[Place],
    sums: InputSums,
    groups: Groups,
) -> Fold:
    """Return the factors of all places, on every rank. Collective; the ranks share the places.

    Args:
        source: The checkpoint, not folded.
        kept: Dtypes of tensors that have another than ``source.dtype``.
        places: The places, equal on all ranks.
        sums: Statistics of the inputs of their readers.
        groups: This rank's groups.

    Raises:
        CalibrationError: On every rank, for statistics that are missing or not finite.
    """
    evidence = _Evidence(source, kept, sums)
    own = places[groups.rank :: groups.size]
    found = together(groups, lambda: joined([fold_place(place, evidence) for place in own]))
    return joined(gather(found, groups))


@dataclass(frozen=True)
class _Evidence:
    """The evidence of a checkpoint and of the statistics of its inputs."""

    source: PartSource
    kept: Mapping[str, torch.dtype]
    sums: InputSums

    def squares(self, slot: Slot) -> torch.Tensor:
        return self.sums.squares(slot)

    def peaks(self, slot: Slot) -> torch.Tensor:
        return self.sums.peaks(slot)

    def norm(self, place: Place) -> torch.Tensor:
        name = place.before[0]
        dtype = self.kept.get(name, self.source.dtype)
        return self.source.checkpoint.read(name, Box((0,), (place.cols,))).to(dtype)

    def rows(self, place: Place, tensor: str) -> torch.Tensor:
        cols = place.after[tensor][1]
        runs = _runs(sampled_rows(place, tensor).tolist())
        boxes = (Box((start, 0), (count, cols)) for start, count in runs)
        return torch.cat([self._read(tensor, box) for box in boxes])

    def column_amax(self, place: Place, tensor: str) -> torch.Tensor:
        parts = (self._read(tensor, box) for box in row_blocks(place.after[tensor]))
        return torch.stack([part.float().abs().amax(0) for part in parts]).amax(0)

    def _read(self, tensor: str, box: Box) -> torch.Tensor:
        return self.source.checkpoint.read(tensor, box).to(self.source.dtype)


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the number of each run of adjacent rows."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or rows[stop] != rows[stop - 1] + 1:
            yield rows[start], stop - start
            start = stop


@dataclass(frozen=True)
class FoldedSums:
    """Statistics of inputs that are divided by factors.

    Attributes:
        sums: Those of the inputs as they are.
        fold: The factors.
    """

    sums: InputSums
    fold: Fold

    def squares(self, slot: Slot) -> torch.Tensor:
        """Return the sums of squares: fp32 [K]."""
        factors = self._factors(slot)
        found = self.sums.squares(slot)
        return found if factors is None else found / factors.square()

    def moment(self, slot: Slot) -> torch.Tensor:
        """Return the sums of products: fp32 [K, K]. gptq's inputs are never divided."""
        assert self._factors(slot) is None, slot
        return self.sums.moment(slot)

    def lost(self, decision: Decision) -> torch.Tensor:
        """Return the sums of (x - y) y^T: fp32 [K, K]; of gptq's inputs too."""
        return self.sums.lost(decision)

    def peaks(self, slot: Slot) -> torch.Tensor:
        """Return the largest magnitudes of the channels: fp32 [K]."""
        factors = self._factors(slot)
        found = self.sums.peaks(slot)
        return found if factors is None else found / factors

    def _factors(self, slot: Slot) -> torch.Tensor | None:
        return self.fold.inputs(f"{slot.sources[0]}.weight")


def folded_amaxes(quant: QuantPlan, inputs: InputAmaxes, sums: FoldedSums) -> InputAmaxes:
    """Return the amaxes of inputs that are divided by factors."""
    found = dict(inputs.found)
    for name in found:
        decision = quant.by_name[name]
        if decision.needs_peaks and decision.static:
            found[name] = sums.peaks(decision.slot).max().item()
    largest = largest_shared(quant, found)
    scales = {
        name: torch.tensor(largest[quant.by_name[name].slot.sharing]) for name in inputs.scales
    }
    return InputAmaxes(found, scales, inputs.cold)
