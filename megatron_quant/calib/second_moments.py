"""Round weights by the second moments of their inputs, as many layers at a time as memory holds.

The inputs of a layer follow from the layers before it. So the last layers are rounded first: each
pass over the data sees the inputs that the unquantized model would show, and the result does not
depend on how many layers a pass takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_quant.calib.calibration_file import MOMENT, CalibrationFile, lost_statistic
from megatron_quant.calib.input_sums import Merged, complete, watch_sums
from megatron_quant.calib.observe import unquantized
from megatron_quant.calib.passes import moment_passes
from megatron_quant.calib.round_layer import LayerRounding
from megatron_quant.calib.search import find_block_scales
from megatron_quant.calib.squares import check_sums
from megatron_quant.dist import Groups, raise_together
from megatron_quant.layers import CachedTensor, QuantLayer
from megatron_quant.recipes import QuantPlan

Forwards = Sequence[Callable[[], object]]
Keep = Callable[[QuantLayer, Merged], None]
MomentOf = Callable[[QuantLayer], Merged]


@dataclass(frozen=True, kw_only=True)
class MomentSource:
    """Where second moments come from, and go to.

    Attributes:
        forwards: Functions that run the calibration data, again for each pass.
        counted: Number of this rank's forwards that count; None for all.
        limit: Most bytes of second moments on a rank; None for any number.
        loaded: A file that has them; nothing is run then.
        keep: Called with each layer's sums, merged over ranks.
        cached: Keys and values, which forwards leave unquantized, as they leave the layers.
    """

    forwards: Forwards = ()
    counted: int | None = None
    limit: int | None = None
    loaded: CalibrationFile | None = None
    keep: Keep = lambda layer, found: None
    cached: Sequence[CachedTensor] = ()


def round_weights(
    layers: Sequence[QuantLayer], plan: QuantPlan, groups: Groups, source: MomentSource
) -> None:
    """Replace the weights of the layers that gptq rounds by values on their grids.

    Every rank of ``groups`` calls it. Their quantizers have the amaxes of their tensors.

    Args:
        layers: This rank's layers of the plan.
        plan: Decisions on every slot of the model.
        groups: This rank's groups.
        source: The second moments.

    Raises:
        CalibrationError: On every rank alike, for inputs that are not finite, and second moments
            that never become positive definite.
    """
    own = {layer.name: layer for layer in layers if layer.rounds}
    limit = source.limit if source.loaded is None else None  # one layer is read at a time
    for one in moment_passes(plan, _expert_ranks(groups), limit):
        held = [own[module] for module in one.modules if module in own]
        rounding = LayerRounding(groups)
        with unquantized([*layers, *source.cached]):
            moment_of = _moments(held, groups, source)
        for layer in held:
            _round(layer, groups, rounding, partial(moment_of, layer), source.keep)
        raise_together(rounding.error, groups)


def _expert_ranks(groups: Groups) -> int:
    replicas = groups.shards.replicas if groups.shards is not None else None
    return replicas.others.size if replicas is not None else 1


def _round(
    layer: QuantLayer,
    groups: Groups,
    rounding: LayerRounding,
    moment: Callable[[], Merged],
    keep: Keep,
) -> None:
    """Find the layer's scales and round it; after an error go on with what others wait for."""
    found = rounding.attempt(lambda: check_sums(layer, moment()))
    if found is not None:
        rounding.attempt(lambda: keep(layer, found))
    if layer.serves_codes:
        rounding.correct(layer, found)
    squares = {layer.name: found.squares_EK} if found is not None and layer.weighted else {}
    find_block_scales([layer], groups, squares)
    rounding.round(layer, found.sums if found is not None else None)


def _moments(held: Sequence[QuantLayer], groups: Groups, source: MomentSource) -> MomentOf:
    """Run the data; return a function that gives a layer's second moments, once. Collective."""
    if source.loaded is not None:
        return partial(_loaded, source.loaded)
    sums, hooks = watch_sums(held, groups, True, source.counted)
    try:
        with torch.no_grad():
            for forward in source.forwards:
                forward()
    finally:
        for hook in hooks:
            hook.remove()

    def merged(layer: QuantLayer) -> Merged:
        return complete(layer, sums.pop(layer.name), groups)

    return merged


def _loaded(file: CalibrationFile, layer: QuantLayer) -> Merged:
    slots = [decision.slot for decision in layer.decisions]
    device = layer.weights()[0].device

    def read(statistic: str) -> Tensor:
        found = [file.needed(s.sources, statistic, (s.shape[1], s.shape[1])) for s in slots]
        return torch.stack(found).to(device)

    lost = read(lost_statistic(layer.decisions[0])) if layer.serves_codes else None
    return Merged(read(MOMENT), torch.ones(len(slots), dtype=torch.int64), lost=lost)
