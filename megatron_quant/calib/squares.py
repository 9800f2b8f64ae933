"""Find the squares of inputs, by which searches for scales weigh columns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_quant.calib.calibration_file import PEAKS, SQUARES, CalibrationFile
from megatron_quant.calib.input_sums import InputSums, Merged, complete, watch_sums
from megatron_quant.dist import Groups, together
from megatron_quant.errors import CalibrationError
from megatron_quant.layers import QuantLayer


@contextmanager
def summed_squares(
    layers: Sequence[QuantLayer], groups: Groups, counted: int | None
) -> Iterator[dict[str, InputSums]]:
    """Sum the squares of inputs, by layer name, while the context lasts."""
    sums, hooks = watch_sums(layers, groups, False, counted)
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def merged_squares(
    layers: Sequence[QuantLayer],
    groups: Groups,
    sums: dict[str, InputSums],
    loaded: CalibrationFile | None,
) -> dict[str, Merged]:
    """Return the squares of all tokens, by layer name. Collective.

    Args:
        layers: The layers that need them, in one order on the ranks that share them.
        groups: This rank's groups.
        sums: This rank's sums by layer name.
        loaded: What an earlier calibration measured, which counts in place of ``sums``.

    Raises:
        CalibrationError: On every rank alike, for squares that are missing or not finite.
    """
    if loaded is not None:
        return together(groups, lambda: {x.name: check_sums(x, _read(x, loaded)) for x in layers})
    found = {layer.name: complete(layer, sums[layer.name], groups) for layer in layers}
    return together(groups, lambda: {x.name: check_sums(x, found[x.name]) for x in layers})


def _read(layer: QuantLayer, file: CalibrationFile) -> Merged:
    first, device = layer.decisions[0], layer.weights()[0].device
    slots = [decision.slot for decision in layer.decisions]

    def read(statistic: str, needed: bool) -> torch.Tensor:
        if not needed:
            return torch.zeros(len(slots), first.slot.shape[1], device=device)
        rows = [file.needed(slot.sources, statistic, (slot.shape[1],)) for slot in slots]
        return torch.stack(rows).to(device)

    squares, peaks = read(SQUARES, first.needs_squares), read(PEAKS, first.needs_peaks)
    return Merged(squares, torch.ones(len(slots), dtype=torch.int64), peaks)


def check_sums(layer: QuantLayer, found: Merged) -> Merged:
    """Return ``found``; raise CalibrationError, with the weight's name, if it is not finite."""
    for decision, row in zip(layer.decisions, found.sums.flatten(1), strict=True):
        if not row.isfinite().all():
            raise CalibrationError(
                f"the squares or products of the inputs of {decision.slot.name} are not finite: an "
                "activation is NaN, infinite or very large on the calibration data; exclude the "
                "layer or look at the model"
            )
    return found
