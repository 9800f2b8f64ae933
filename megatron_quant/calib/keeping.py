"""Keep what a calibration measures in a calibration file, by which ranks hold what."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from megatron_quant.calib.calibration import CalibrationReport
from megatron_quant.calib.calibration_file import (
    AMAX,
    MOMENT,
    PEAKS,
    SQUARES,
    TOKENS,
    CalibrationWriter,
    cache_key,
    lost_statistic,
    statistic_key,
)
from megatron_quant.calib.input_sums import InputPlace, Merged
from megatron_quant.calib.sync import merge_max
from megatron_quant.dist import Groups, together
from megatron_quant.errors import ExportError
from megatron_quant.layers import QuantLayer
from megatron_quant.recipes import QuantPlan, largest_shared

_Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class SquareSums:
    """Collects the sum of squares of each weight's inputs, which tells calibrations apart."""

    def __init__(self) -> None:
        self._own: dict[str, torch.Tensor] = {}

    def add(self, layer: QuantLayer, found: Merged) -> None:
        """Add a layer's."""
        for index, decision in enumerate(layer.decisions):
            of_channels = found.squares_EK if decision.needs_squares else found.peaks
            assert of_channels is not None, "peaks are beside squares"
            self._own[decision.slot.name] = of_channels[index].sum()

    def merged(self, plan: QuantPlan, groups: Groups) -> dict[str, float]:
        """Return those of all ranks by slot name, on every rank. Collective."""
        names = [d.slot.name for d in plan.quantized if d.needs_channels]
        return merge_max(names, self._own, groups) if names else {}


class CalibrationKeeper:
    """Writes the file of a calibration that several ranks make.

    Begin with :meth:`start`, give it every layer's sums, end with :meth:`finish`.
    """

    def __init__(self, path: Path, plan: QuantPlan, hessians: bool, groups: Groups) -> None:
        """Plan nothing yet.

        Args:
            path: The file.
            plan: Decisions on every slot of the model.
            hessians: Whether it gets second moments too.
            groups: This rank's groups.
        """
        self._path, self._plan, self._hessians, self._groups = path, plan, hessians, groups
        self._writer: CalibrationWriter | None = None

    def start(self, report: CalibrationReport, kv_amax: Mapping[str, float]) -> None:
        """Make the file and write amaxes and counts. Collective.

        Raises:
            ExportError: On every rank, for what the disk refuses.
        """
        known = dict(_known(self._plan, report))
        known |= {cache_key(name): torch.tensor(value) for name, value in kv_amax.items()}
        shapes: _Shapes = {name: (t.dtype, tuple(t.shape)) for name, t in known.items()}
        writer = CalibrationWriter(self._path, shapes | dict(self._sums()))
        self._writer, first = writer, self._groups.rank == 0

        def write() -> None:
            if first:
                writer.create()
                for name, value in known.items():
                    writer.put(name, value)

        together(self._groups, write)

    def _sums(self) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
        for decision in self._plan.measured:
            slot = decision.slot
            cols = slot.shape[1]
            needed = {SQUARES: decision.needs_squares, PEAKS: decision.needs_peaks}
            for statistic in (name for name, is_needed in needed.items() if is_needed):
                for module in slot.sources:
                    yield statistic_key(module, statistic), (torch.float32, (cols,))
            if decision.rounds and self._hessians:
                products = [MOMENT, lost_statistic(decision)] if decision.serves_codes else [MOMENT]
                for statistic in products:
                    key = statistic_key(slot.sources[0], statistic)
                    yield key, (torch.float32, (cols, cols))

    def keep(self, layer: QuantLayer, found: Merged) -> None:
        """Write the sums of one layer's inputs, on one of the ranks that hold them.

        Raises:
            ExportError: For what the disk refuses.
        """
        place, writer = InputPlace.of(layer, self._groups), self._writer
        assert writer is not None, "not started"
        if place.replicas.rank or place.shards.rank:
            return
        for index, decision in enumerate(layer.decisions):
            sources = decision.slot.sources
            for module in sources:
                if decision.needs_squares:
                    writer.put(statistic_key(module, SQUARES), found.squares_EK[index])
                if decision.needs_peaks and found.peaks is not None:
                    writer.put(statistic_key(module, PEAKS), found.peaks[index])
            if self._hessians and decision.rounds:
                writer.put(statistic_key(sources[0], MOMENT), found.sums[index])
                if found.lost is not None:
                    writer.put(
                        statistic_key(sources[0], lost_statistic(decision)), found.lost[index]
                    )

    def finish(self) -> None:
        """Give the file its name. Collective.

        Raises:
            ExportError: On every rank, for what the disk refuses.
        """
        writer, first = self._writer, self._groups.rank == 0
        assert writer is not None, "not started"
        together(self._groups, writer.close)  # all have written
        together(self._groups, lambda: writer.finish() if first else None)

    def abandon(self) -> None:
        """Remove the unfinished file."""
        if self._writer is None:
            return
        if self._groups.rank == 0:
            self._writer.abandon()
        else:
            with suppress(ExportError):
                self._writer.close()


def _known(plan: QuantPlan, report: CalibrationReport) -> Iterator[tuple[str, torch.Tensor]]:
    # A rank knows the largest input of all its experts, not of each: the layer's is layout-free.
    largest = largest_shared(plan, report.scaled_amax)
    for decision in plan.quantized:
        slot = decision.slot
        for module in slot.sources:
            if decision.measured and slot.sharing in largest:
                yield statistic_key(module, AMAX), torch.tensor(largest[slot.sharing])
            if slot.name in report.tokens:
                yield statistic_key(module, TOKENS), torch.tensor(report.tokens[slot.name])
