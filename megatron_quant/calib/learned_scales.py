"""Learn the scales of blocks in training, each with a step of its own, beside the optimizer.

A scale that is learned is the statistic of its block, in fp32. Adam moves its logarithm, so a
learning rate is a relative step, and the size of the gradient does not matter. Ranks that hold
parts of a block, or are given other tokens, add their gradients up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_quant.calib.blocks import RegionStat, merge, shards_of, stacked
from megatron_quant.calib.input_sums import replicas_of
from megatron_quant.dist import Groups, ordered_sum, sum_reduce
from megatron_quant.errors import QuantError
from megatron_quant.formats import edge_of
from megatron_quant.layers import QuantLayer, block_amax, set_block_amax
from megatron_quant.rounding import scale_gradient

_FORMATS = ("int4", "nvfp4")
_BETAS, _EPSILON = (0.9, 0.95), 1e-12
_BEYOND = 2.0**16
"""A weight times this saturates, unless it is 0 for all that its scale can tell."""


@dataclass(kw_only=True)
class _Learned:
    """A layer's scales: fp32 [E, N_b, K_b], and the moments of their gradients."""

    layer: QuantLayer
    stat: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, layer: QuantLayer, held: Tensor) -> "_Learned":
        stat = (held if layer.grouped else held.unsqueeze(0))[..., 0].float()
        gradient, first, second = (torch.zeros_like(stat) for _ in range(3))
        return cls(layer=layer, stat=stat, gradient=gradient, first=first, second=second)

    def give(self) -> None:
        stat = self.stat.unsqueeze(-1)
        set_block_amax(self.layer.weight_quantizer, stat if self.layer.grouped else stat[0])


class ScaleLearner:
    """Learns the scales onto which gptq rounded NVFP4's and INT4's weights.

    In every step call :meth:`collect` after the last backward, before gradients are reduced, and
    :meth:`step` after the optimizer's. Both are collective. Moments are not saved: a run that goes
    on from a save begins with new ones.
    """

    def __init__(self, layers: Sequence[QuantLayer], groups: Groups, lr: float) -> None:
        """Begin with the scales that the layers have.

        Args:
            layers: This rank's layers.
            groups: This rank's groups.
            lr: Largest relative step, such as 0.001.

        Raises:
            QuantError: For a step that is not above 0, and where no scale would stay.
        """
        if not 0 < lr < 1:
            raise QuantError(f"--scale-lr is {lr:g}: give a relative step above 0, such as 0.001")
        held = [(x, block_amax(x.weight_quantizer)) for x in layers if _learns(x)]
        self._learned = [_Learned.of(layer, stat) for layer, stat in held if stat is not None]
        if not self._learned and layers:
            raise QuantError(
                "scales are learned of nvfp4 and int4 weights that gptq has rounded, whose scales "
                "stay, but for signed ones; others follow the weights: start from a checkpoint of "
                "--algorithm gptq (--start-from)"
            )
        self._groups, self._lr, self._steps = groups, lr, 0

    @torch.no_grad()
    def collect(self) -> None:
        """Find the gradients of the scales from those of the weights. Collective."""
        found: list[RegionStat] = []
        for one in self._learned:
            found += _gradients(one.layer)
        cut = [(item, item.edge.pack(item.stat, 0.0)) for item in found if item.edge]
        for (item, _), merged in zip(cut, merge(cut, sum_reduce, self._groups), strict=True):
            assert item.edge is not None
            item.edge.unpack(merged, item.stat)
        parts = iter(found)
        for one in self._learned:
            own = [next(parts).stat for _ in one.layer.regions]
            one.gradient = torch.cat(own, -2)
        self._add_up()

    def _add_up(self) -> None:
        """Add up the gradients of ranks that are given other tokens of the same weights."""
        replicas = replicas_of(self._groups)
        for experts in (False, True):
            chosen = [one for one in self._learned if one.layer.grouped is experts]
            if not chosen:
                continue
            flat = torch.cat([one.gradient.flatten() for one in chosen])
            flat = ordered_sum(flat, replicas.experts if experts else replicas.dense)
            sizes = [one.gradient.numel() for one in chosen]
            for one, part in zip(chosen, flat.split(sizes), strict=True):
                one.gradient = part.view(one.gradient.shape)
            for one in chosen:
                # Megatron marks weights that each rank of a tensor-parallel group has whole, and
                # multiplies with a part of each sequence.
                if getattr(one.layer.parameters[0], "sequence_parallel", False):
                    one.gradient = ordered_sum(one.gradient, shards_of(self._groups, experts))

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Move the scales by ``factor`` of the largest step at most."""
        self._steps += 1
        (one_beta, two_beta), count = _BETAS, self._steps
        for one in self._learned:
            one.first.lerp_(one.gradient, 1 - one_beta)
            one.second.lerp_(one.gradient.square(), 1 - two_beta)
            root = (one.second / (1 - two_beta**count)).sqrt_()
            move = one.first / (1 - one_beta**count) / root.add_(_EPSILON)
            one.stat.mul_(torch.exp(-self._lr * factor * move))
            one.give()


def _learns(layer: QuantLayer) -> bool:
    fmt = layer.weight_format
    return layer.rounds and fmt.name in _FORMATS and not fmt.signed


def _gradients(layer: QuantLayer) -> list[RegionStat]:
    """Return the gradients of the blocks of each region, as this rank's tokens have them."""
    w_ENK, fmt = stacked(layer), layer.weight_format
    gradients = [g[: layer.rows] for p in layer.parameters if (g := _gradient(p)) is not None]
    complete = len(gradients) == len(w_ENK)  # otherwise frozen, or no token reached it
    grad_ENK = torch.stack(gradients) if complete else torch.zeros_like(w_ENK)
    rounded, end = (_values(layer, values) for values in (w_ENK, w_ENK * _BEYOND))
    found = []
    for region in layer.regions:
        w, q, last, g = (region.take(t) for t in (w_ENK, rounded, end, grad_ENK))
        stat = scale_gradient(w, q, last, g, fmt, region.start[1])
        found.append(RegionStat(layer, region, edge_of(region, fmt), stat))
    return found


def _gradient(parameter: Tensor) -> Tensor | None:
    """Return a parameter's gradient, wherever DistributedDataParallel keeps it."""
    main: Tensor | None = getattr(parameter, "main_grad", None)
    return parameter.grad if main is None else main


def _values(layer: QuantLayer, w_ENK: Tensor) -> Tensor:
    """Return what the layer's quantizer makes of weights."""
    found: Tensor = layer.weight_quantizer(w_ENK if layer.grouped else w_ENK[0])
    return found if layer.grouped else found.unsqueeze(0)
