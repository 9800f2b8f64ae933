"""Round the weights of a layer by GPTQ, whole rows at a time, whatever shard of them a rank holds.

A rank with whole rows rounds its own. Ranks that hold columns exchange rows first: each is given
whole rows, rounds them, and sends the columns back. A row's result depends on the row alone, so it
is the same at every layout. Weights for inputs in codes are corrected before, in the same way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from megatron_quant.calib.blocks import shards_of, stacked
from megatron_quant.calib.input_sums import Merged
from megatron_quant.dist import Groups, exchange
from megatron_quant.formats import Format, put_together, scales_of, tensor_scale
from megatron_quant.layers import QuantLayer, block_amax, split_stat
from megatron_quant.rounding import GptqSettings, Piece, correction, gptq_pieces, serve_

T = TypeVar("T")
_Origin = tuple[int, int]
_Work = Callable[[Tensor, Tensor | None, _Origin], Tensor]
"""(Whole rows [E, n, K], statistics of their blocks, where they start) -> their new values."""


class LayerRounding:
    """Rounds layers one after another; a rank that fails goes on to answer the others.

    Attributes:
        error: What failed first on this rank; None while nothing has.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self.error: BaseException | None = None
        self._stopped = False

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Return what ``work`` does; None, and the error kept, where it raises."""
        try:
            return work()
        except BaseException as error:
            self._fail(error)
            return None

    def round(self, layer: QuantLayer, moment_EKK: Tensor | None) -> None:
        """Replace the layer's weights by values on its grid. Collective over its shards.

        Args:
            layer: Its quantizer has amax and statistics of blocks.
            moment_EKK: Second moments of its inputs, fp32; None on a rank that has failed.
        """
        if _is_cut(layer):
            work = None if moment_EKK is None else partial(_rounded_rows, layer, moment_EKK)
            self._exchanged(layer, work)
        elif moment_EKK is not None and not self._stopped:
            self.attempt(lambda: _give(layer, _rounded(layer, moment_EKK)))

    def correct(self, layer: QuantLayer, found: Merged | None) -> None:
        """Let the layer's weights give back what codes lose of its inputs. Collective likewise.

        Args:
            layer: Its inputs are served in codes.
            found: What was measured, whose sums become those of the codes; None on a rank that has
                failed.
        """
        work: _Work | None = None
        if found is not None and found.lost is not None and not self._stopped:
            serve_(found.sums, found.lost)
            work = partial(_corrected, layer, found.sums, found.lost)
        if _is_cut(layer):
            self._exchanged(layer, work)
        elif work is not None:
            self.attempt(lambda: _give(layer, work(stacked(layer), None, (0, 0))))

    def _fail(self, error: BaseException | None) -> None:
        self.error, self._stopped = self.error or error, True

    def _exchanged(self, layer: QuantLayer, work: _Work | None) -> None:
        rows = _SharedRows(layer, shards_of(self._groups, layer.grouped))
        whole = self._received(rows.outgoing, rows.incoming_sizes, rows.shards)
        rounded: Tensor | None = None
        if whole is not None and work is not None:
            rounded = self.attempt(lambda: rows.renewed(whole, work))
        back = self._received(lambda: rows.returned(rounded), rows.returned_sizes, rows.shards)
        if back is not None:
            self.attempt(lambda: _give(layer, rows.assembled(back)))

    def _received(
        self, parts: Callable[[], Sequence[Tensor]], sizes: Sequence[int], shards: Groups
    ) -> Tensor | None:
        try:
            found = exchange(None if self._stopped else parts, sizes, shards)
        except BaseException as error:
            self._fail(error)
            return None
        if found is None:
            self._fail(None)
        return found


def _is_cut(layer: QuantLayer) -> bool:
    """Return whether the rank holds columns of the weights, not whole rows."""
    region = layer.regions[0]
    return region.size[1] < region.whole[1]


def _settings(layer: QuantLayer) -> GptqSettings:
    return GptqSettings(layer.decisions[0].damp, [d.slot.name for d in layer.decisions])


def _stat(layer: QuantLayer) -> Tensor | None:
    """Return the statistics of the layer's blocks, [E, N_b, K_b, P]; None without blocks."""
    stat = block_amax(layer.weight_quantizer)
    return stat if stat is None or layer.grouped else stat.unsqueeze(0)


def _scales(
    w_ENK: Tensor, layer: QuantLayer, stat: Tensor | None, origin: _Origin
) -> dict[str, Tensor]:
    fmt = layer.weight_format
    dscale = tensor_scale(layer.amax_of_stack(), fmt) if fmt.tensor_scale else None
    return scales_of(w_ENK, fmt, dscale, stat, origin)


def _rounded(layer: QuantLayer, moment_EKK: Tensor) -> Tensor:
    """Return the values on the grid of weights that are whole rows: fp32 [E, N, K]."""
    w_ENK, stat, fmt = stacked(layer), _stat(layer), layer.weight_format
    regions = layer.regions
    stats = [None] * len(regions) if stat is None else split_stat(stat, regions, fmt)
    pieces = []
    for region, own in zip(regions, stats, strict=True):
        held, origin = region.take(w_ENK), (region.start[0], region.start[1])
        pieces.append(Piece(held, _scales(held, layer, own, origin), origin))
    rounded = gptq_pieces(pieces, fmt, moment_EKK, _settings(layer))
    return put_together([one.w for one in rounded], regions)


def _rounded_rows(
    layer: QuantLayer, moment_EKK: Tensor, w_EnK: Tensor, stat: Tensor | None, origin: _Origin
) -> Tensor:
    """Return the values on the grid of whole rows: fp32 [E, n, K]."""
    piece = Piece(w_EnK, _scales(w_EnK, layer, stat, origin), origin)
    (rounded,) = gptq_pieces([piece], layer.weight_format, moment_EKK, _settings(layer))
    return rounded.w


def _corrected(
    layer: QuantLayer,
    moment_EKK: Tensor,
    lost_EKK: Tensor,
    w_EnK: Tensor,
    stat: Tensor | None,
    origin: _Origin,
) -> Tensor:
    """Return whole rows with what they give back: [E, n, K]."""
    names = [decision.slot.name for decision in layer.decisions]
    of_experts = zip(moment_EKK, lost_EKK, names, w_EnK, strict=True)
    return torch.stack([correction(h, lost, n).apply(w_nK) for h, lost, n, w_nK in of_experts])


@torch.no_grad()
def _give(layer: QuantLayer, rounded_ENK: Tensor) -> None:
    for weight, values in zip(layer.weights(), rounded_ENK, strict=True):
        weight.copy_(values)


@dataclass(frozen=True)
class _Share:
    """A rank's share of the rows, and of the rows of blocks that they consist of."""

    rows: slice
    blocks: slice


class _SharedRows:
    """The rows of a layer whose columns several ranks hold, shared out among them."""

    def __init__(self, layer: QuantLayer, shards: Groups) -> None:
        (region,) = layer.regions
        self.shards, self._w_ENK = shards, stacked(layer)
        self._start, self._size, self._whole = region.start[1], region.size[1], region.whole[1]
        self._fmt: Format = layer.weight_format
        self._stat = _stat(layer)
        rows, block = region.size[0], (self._fmt.stat_block or (1, 0))[0] or region.size[0]
        self._shares = _shares(rows, block, shards.size)
        self._own = self._shares[shards.rank]

    def outgoing(self) -> list[Tensor]:
        """Return this rank's columns, and their statistics, of each rank's rows."""
        return [self._bytes(share) for share in self._shares]

    def _bytes(self, share: _Share) -> Tensor:
        parts = [self._w_ENK[:, share.rows]]
        if self._stat is not None:
            parts.append(self._stat[:, share.blocks])
        return torch.cat([_as_bytes(part) for part in parts])

    @property
    def incoming_sizes(self) -> list[int]:
        """Return the bytes that come from each rank before rounding."""
        return [
            prod(self._w_shape(self._own)) * self._w_ENK.itemsize
            + (0 if self._stat is None else 4 * prod(self._stat_shape(rank)))
            for rank in range(self.shards.size)
        ]

    def _w_shape(self, share: _Share) -> tuple[int, ...]:
        return len(self._w_ENK), share.rows.stop - share.rows.start, self._size

    def _stat_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of the statistics that a rank has of this rank's rows."""
        assert self._stat is not None
        touched, blocks = self._touched(rank), self._own.blocks
        rows, columns = blocks.stop - blocks.start, touched.stop - touched.start
        return len(self._stat), rows, columns, self._stat.shape[-1]

    def _touched(self, rank: int) -> slice:
        """Return the columns of blocks that a rank's columns touch."""
        assert self._fmt.stat_block is not None
        step, start = self._fmt.stat_block[1] or self._whole, rank * self._size
        return slice(start // step, -(-(start + self._size) // step))

    def renewed(self, received: Tensor, work: _Work) -> Tensor:
        """Return what ``work`` makes of this rank's rows, whole ones: [E, n, K]."""
        device, dtype = self._w_ENK.device, self._w_ENK.dtype
        columns, stats = [], []
        for rank, data in enumerate(received.split(self.incoming_sizes)):
            shape = self._w_shape(self._own)
            size = prod(shape) * dtype.itemsize
            columns.append(data[:size].clone().view(dtype).view(shape))
            if self._stat is not None:
                stats.append(data[size:].clone().view(torch.float32).view(self._stat_shape(rank)))
        w_EnK = torch.cat(columns, -1).to(device)
        if not w_EnK.numel():
            return w_EnK
        stat = self._joined(stats).to(device) if stats else None
        return work(w_EnK, stat, (self._own.rows.start, 0))

    def _joined(self, stats: Sequence[Tensor]) -> Tensor:
        """Put the ranks' statistics together; they agree on blocks that several touch."""
        count = self._touched(self.shards.size - 1).stop
        experts, rows, _, parts = stats[0].shape
        whole = stats[0].new_empty(experts, rows, count, parts)
        for rank, stat in enumerate(stats):
            whole[:, :, self._touched(rank)] = stat
        return whole

    def returned(self, rounded_EnK: Tensor | None) -> list[Tensor]:
        """Return each rank's columns of the rows that this rank rounded."""
        assert rounded_EnK is not None, "a rank that failed sends nothing"
        parts = rounded_EnK.to(self._w_ENK.dtype).split(self._size, -1)
        return [_as_bytes(part) for part in parts]

    @property
    def returned_sizes(self) -> list[int]:
        """Return the bytes that come back from each rank."""
        return [prod(self._w_shape(share)) * self._w_ENK.itemsize for share in self._shares]

    def assembled(self, received: Tensor) -> Tensor:
        """Put this rank's columns of all rows together: [E, N, k]."""
        parts = zip(received.split(self.returned_sizes), self._shares, strict=True)
        dtype = self._w_ENK.dtype
        rows = [part.clone().view(dtype).view(self._w_shape(share)) for part, share in parts]
        return torch.cat(rows, 1).to(self._w_ENK.device)


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(-1).view(torch.uint8)


def _shares(rows: int, block: int, ranks: int) -> list[_Share]:
    """Share rows out in whole blocks of ``block`` rows."""
    count = -(-rows // block)
    edges = [count * rank // ranks for rank in range(ranks + 1)]
    return [
        _Share(slice(min(low * block, rows), min(high * block, rows)), slice(low, high))
        for low, high in pairwise(edges)
    ]
