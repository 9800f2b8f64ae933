"""Observe squares and products of layers' inputs, and merge them over ranks.

The second moment of an input, the sum of x x^T over tokens, belongs to the logical tensor: fused
weights share one, and each expert has that of its own tokens. Ranks that are given the same tokens
share the work: each sums some rows of the matrix. Where the inputs are cut along K, every rank is
given the other columns, so that no product is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_quant.calib.blocks import shards_of
from megatron_quant.calib.hearing import hear
from megatron_quant.dist import Groups, Replicas, joined, max_reduce, ordered_sum
from megatron_quant.formats import Format, fake_quant, tensor_scale
from megatron_quant.layers import QuantLayer

_TOKENS = 4096
"""Tokens whose products are summed at a time."""


@dataclass(frozen=True, kw_only=True)
class InputPlace:
    """This rank's part of a layer's inputs.

    Attributes:
        inputs: Number of inputs: experts of this rank, or 1.
        cols: K of the logical tensor.
        own: Columns that this rank sums rows of products for.
        cut: Whether it is given these columns alone.
        split: Whether ranks that share the layer are given other tokens each.
        shards: Those ranks.
        replicas: Ranks that are given other tokens of the same weights.
    """

    inputs: int
    cols: int
    own: slice
    cut: bool
    split: bool
    shards: Groups
    replicas: Groups

    @classmethod
    def of(cls, layer: QuantLayer, groups: Groups) -> "InputPlace":
        """Return the place of ``layer``."""
        region, experts = layer.regions[0], layer.grouped
        shards, given = shards_of(groups, experts), replicas_of(groups)
        replicas = given.experts if experts else given.dense
        cols, start, size = region.whole[1], region.start[1], region.size[1]
        cut, split = size < cols, _splits_tokens(layer)
        own = slice(start, start + size)
        if not cut and not split and cols % shards.size == 0:
            each = cols // shards.size
            own = slice(shards.rank * each, (shards.rank + 1) * each)
        return cls(
            inputs=len(layer.decisions) if experts else 1,
            cols=cols,
            own=own,
            cut=cut,
            split=split,
            shards=shards,
            replicas=replicas,
        )


def replicas_of(groups: Groups) -> Replicas:
    """Return the ranks that are given other tokens of this rank's weights."""
    assert groups.shards is not None, "who shares this rank's tensors is not known"
    assert groups.shards.replicas is not None, "who is given other tokens is not known"
    return groups.shards.replicas


def _splits_tokens(layer: QuantLayer) -> bool:
    """Return whether tensor-parallel ranks are given a part of each sequence (sequence parallel).

    A linear with a norm is looked at after its inputs are put together again, and one that is cut
    along K is given all tokens.
    """
    module: Any = layer.module
    if layer.grouped or layer.regions[0].size[1] < layer.regions[0].whole[1]:
        return False
    return not hasattr(module, "layer_norm_weight") and bool(module.config.sequence_parallel)


@dataclass(frozen=True)
class ServedInputs:
    """How a layer's inputs are served: a format, and the scale of the whole tensor, if any."""

    fmt: Format
    dscale: Tensor | None

    @classmethod
    def of(cls, layer: QuantLayer) -> "ServedInputs | None":
        """Return them; None for a layer that is not rounded for inputs in codes."""
        decision = layer.decisions[0]
        if not decision.serves_codes or decision.inputs is None:
            return None
        amax = layer.input_amax()
        return cls(decision.inputs, None if amax is None else tensor_scale(amax, decision.inputs))

    def rounded(self, x_TK: Tensor) -> Tensor:
        """Return the values that the codes of ``x_TK`` stand for."""
        return fake_quant(x_TK, self.fmt, self.dscale)


class InputSums:
    """Sums over the tokens that a layer was given.

    Attributes:
        sums: fp32 [E, R, K] of products, R rows of the matrix; [E, k] of squares, k given columns.
        peaks: fp32 [E, k], largest magnitudes of the given columns, where these are summed.
        lost: fp32 [E, R, K], like sums, of (x - y) y^T, y what the codes of x stand for; None where
            the layer is not rounded for inputs in codes.
        tokens: int64 [E].
    """

    def __init__(self, layer: QuantLayer, place: InputPlace, products: bool, most: int | None):
        """Begin with nothing.

        Args:
            layer: The layer.
            place: What the rank is given.
            products: Whether to sum products; squares otherwise.
            most: Number of forwards that count; those after them repeat batches. None for all.
        """
        device, rows = layer.weights()[0].device, place.own.stop - place.own.start
        shape = (place.inputs, rows, place.cols) if products else (place.inputs, _given(place))
        self.place, self.products = place, products
        self.sums = torch.zeros(shape, device=device)
        self.peaks = torch.zeros(place.inputs, _given(place), device=device)
        self.tokens = torch.zeros(place.inputs, dtype=torch.int64)
        self._served = ServedInputs.of(layer) if products else None
        self.lost = None if self._served is None else torch.zeros_like(self.sums)
        self._left = most

    def see_grouped(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add inputs; a forward pre-hook of a grouped linear, called with (x, m_splits)."""
        self._see(args[0], torch.as_tensor(args[1]).tolist())

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add inputs; a forward pre-hook of an input quantizer."""
        x_TK = args[0].reshape(-1, args[0].shape[-1])
        self._see(x_TK, [len(x_TK)])

    def _see(self, x_TK: Tensor, splits: list[int]) -> None:
        x_TK = x_TK.detach()
        if self.products and self.place.cut:  # collective, so also for forwards that do not count
            x_TK = joined(x_TK, 1, self.place.shards)
        if self._left is not None:
            if self._left == 0:
                return
            self._left -= 1
        self.tokens += torch.tensor(splits)
        for index, part_TK in enumerate(x_TK.split(splits)):
            for some_TK in part_TK.split(_TOKENS):
                self._add(index, some_TK.float())

    def _add(self, index: int, x_TK: Tensor) -> None:
        if self.products:
            self.sums[index].addmm_(x_TK[:, self.place.own].mT, x_TK)
            if self.lost is not None and self._served is not None:
                y_TK = self._served.rounded(x_TK)
                self.lost[index].addmm_((x_TK - y_TK)[:, self.place.own].mT, y_TK)
        elif len(x_TK):
            self.sums[index] += x_TK.square().sum(0)
            self.peaks[index] = torch.maximum(self.peaks[index], x_TK.abs().amax(0))

    @torch.no_grad()
    def merged(self) -> "Merged":
        """Return the sums over all ranks that are given tokens of these weights. Collective."""
        place = self.place
        tokens = ordered_sum(self.tokens, place.replicas)
        if place.split:
            tokens = ordered_sum(tokens, place.shards)
        return Merged(
            self._merged(self.sums),
            tokens,
            None if self.products else self._merged_peaks(),
            None if self.lost is None else self._merged(self.lost),
        )

    def _merged(self, sums: Tensor) -> Tensor:
        place = self.place
        found = ordered_sum(sums, place.replicas)
        if place.split:
            return ordered_sum(found, place.shards)
        if place.cut or (self.products and place.own != slice(0, place.cols)):
            return joined(found, 1, place.shards)
        return found

    def _merged_peaks(self) -> Tensor:
        place = self.place
        peaks = max_reduce(self.peaks, place.replicas)
        if place.split:
            return max_reduce(peaks, place.shards)
        return joined(peaks, 1, place.shards) if place.cut else peaks


def _given(place: InputPlace) -> int:
    return place.own.stop - place.own.start if place.cut else place.cols


@dataclass(frozen=True)
class Merged:
    """Statistics over all tokens, fp32.

    Attributes:
        sums: Sums of squares [E, K], or of products [E, K, K].
        tokens: Their number [E].
        peaks: Largest magnitudes [E, K]; None beside products.
        lost: Sums of (x - y) y^T [E, K, K], y what the codes of x stand for; None where the layer
            is not rounded for inputs in codes.
    """

    sums: Tensor
    tokens: Tensor
    peaks: Tensor | None = None
    lost: Tensor | None = None

    @property
    def squares_EK(self) -> Tensor:
        """Return the sums of squares."""
        return self.sums if self.sums.dim() == 2 else self.sums.diagonal(dim1=1, dim2=2)

    def filled(self, others: Groups) -> "Merged":
        """Give experts without a token the sum over the layer's experts. Collective.

        Args:
            others: The ranks that hold the layer's other experts.
        """
        cold_E = self.tokens == 0
        if not max_reduce(cold_E.any().to(torch.int64).view(1), others).item():
            return self

        def filled(own: Tensor) -> Tensor:
            pooled = ordered_sum(own.sum(0), others)
            found = own.clone()
            found[cold_E.to(found.device)] = pooled
            return found

        lost = None if self.lost is None else filled(self.lost)
        return replace(self, sums=filled(self.sums), lost=lost)


def complete(layer: QuantLayer, sums: InputSums, groups: Groups) -> Merged:
    """Return the sums of all tokens; experts without any have their layer's. Collective."""
    found = sums.merged()
    if not layer.grouped:
        return found
    return found.filled(replicas_of(groups).others)


def watch_sums(
    layers: Sequence[QuantLayer], groups: Groups, products: bool, most: int | None
) -> tuple[dict[str, InputSums], list[Any]]:
    """Hook sums onto layers; return them by layer name, and the hooks."""
    found = {x.name: InputSums(x, InputPlace.of(x, groups), products, most) for x in layers}
    hooks: list[Any] = [
        hear(x.module, found[x.name].see_grouped)
        if x.grouped
        else hear(x.input_quantizer, found[x.name].see)
        for x in layers
    ]
    return found, hooks
