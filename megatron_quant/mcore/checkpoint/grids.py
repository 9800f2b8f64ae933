"""Grids of block statistics in a distributed checkpoint.

A grid is stored once, for the logical tensor, whichever ranks hold its shards. A rank writes the
blocks whose first element it holds, and reads every block that its shard touches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_quant.formats import Region
from megatron_quant.layers import BLOCK_AMAX, LocalWeight, QuantLayer

Replica = tuple[int, int, int]
"""Megatron's (pipeline, tensor, data parallel): (0, 0, 0) is written, others are copies."""


@dataclass(frozen=True)
class GridPiece:
    """Blocks of one logical tensor in a rank's statistics.

    rows, cols: the blocks' rows and columns in the statistics. offset: the place of the first one
    in the logical grid, in which fused tensors follow one another by rows. own: whether this rank
    holds the blocks' first elements.
    """

    rows: tuple[int, ...]
    cols: slice
    offset: tuple[int, int]
    own: bool


@dataclass(frozen=True, kw_only=True)
class SavedGrid:
    """The block statistics of one layer's weights, on this rank and in the checkpoint.

    whole: (rows, columns) of the logical grid; fused tensors follow one another by rows.
    first, experts: the rank's first expert, and how many the layer has; None for a dense layer.
    """

    layer: QuantLayer
    whole: tuple[int, int]
    pieces: tuple[GridPiece, ...]
    first: int | None
    experts: int
    is_cut: bool

    def key(self, expert: int | None) -> str:
        """Return the key in the checkpoint: the layer's, or an expert's if each has its own."""
        name = self.layer.name
        if self.first is not None:
            module, _, linear = name.rpartition(".")
            apart = "" if expert is None else f"{expert}."
            name = f"{module}.experts.{apart}{linear}"
        return f"{name}.weight_quantizer.{BLOCK_AMAX}"

    def factory(self, stat: torch.Tensor, singleton: bool, dp_rank: int) -> ShardedTensorFactory:
        """Describe the layer's statistics in the form that Megatron saves and loads.

        stat: fp32 [N_b, K_b, P]; [E, N_b, K_b, P] for experts.
        """
        if self.first is not None:
            replica = (
                0,
                mpu.get_expert_tensor_parallel_rank(),
                mpu.get_expert_data_parallel_rank(),
            )
        else:
            replica = (0, mpu.get_tensor_model_parallel_rank(), dp_rank)
        build = partial(self._build, singleton)
        merge = partial(self._merge, singleton, stat.shape)
        return ShardedTensorFactory(self.key(None), stat, build, merge, replica)

    def _build(
        self, singleton: bool, key: str, stat: torch.Tensor, replica: Any, flattened: Any
    ) -> dict[str, ShardedTensor]:
        assert flattened is None, "no optimizer has this tensor"
        built = {}
        for at, piece in enumerate(self.pieces):
            values = _take(stat, piece)
            id_ = self._replica(piece, replica)
            if self.first is None:
                built[f"{at}"] = _sharded(key, values, piece.offset, self.whole, id_)
            elif not singleton:
                offset, whole = (self.first, *piece.offset), (self.experts, *self.whole)
                built[f"{at}"] = _sharded(key, values, offset, whole, id_)
            else:
                for local, own in enumerate(values):
                    name = self.key(self.first + local)
                    built[f"{at}.{local}"] = _sharded(name, own, piece.offset, self.whole, id_)
        return built

    def _replica(self, piece: GridPiece, replica: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (0, 0, 0) on exactly one rank: shards of a cut tensor are not replicas."""
        if not piece.own:
            return (1, *replica[1:])
        return (0, 0, replica[2]) if self.is_cut else replica

    def _merge(
        self, singleton: bool, shape: torch.Size, loaded: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        stat = next(iter(loaded.values())).new_zeros(shape)
        for at, piece in enumerate(self.pieces):
            if self.first is not None and singleton:
                values = torch.stack([loaded[f"{at}.{e}"] for e in range(shape[0])])
            else:
                values = loaded[f"{at}"]
            stat[..., list(piece.rows), piece.cols, :] = values
        return stat


def _take(stat: torch.Tensor, piece: GridPiece) -> torch.Tensor:
    return stat[..., list(piece.rows), piece.cols, :].contiguous()


def _sharded(
    key: str,
    values: torch.Tensor,
    offset: tuple[int, ...],
    whole: tuple[int, ...],
    replica: tuple[int, int, int],
) -> ShardedTensor:
    """Describe a box of a grid; ``offset`` and ``whole`` leave out the statistics' last dim."""
    shape, parts = tuple(values.shape), values.shape[-1]
    return ShardedTensor(
        key, values, values.dtype, shape, (*whole, parts), (*offset, 0), None, replica
    )


def grids_of(layers: Sequence[QuantLayer], weights: Sequence[LocalWeight]) -> list[SavedGrid]:
    """Return the grids of the layers whose block scales were searched, or found before rounding.

    Other scales follow from the weights and are not stored. weights: this rank's share of all
    slots, and of their tensors.
    """
    held = {weight.slot: weight for weight in weights}
    return [_grid(layer, held) for layer in layers if layer.keeps_blocks]


def _grid(layer: QuantLayer, held: Mapping[str, LocalWeight]) -> SavedGrid:
    slot = layer.decisions[0].slot
    regions = held[slot.name].regions or layer.regions
    block = layer.weight_format.stat_block
    assert block is not None
    pieces: list[GridPiece] = []
    above = below = at = columns = 0
    for region in regions:
        if region.part is None or region.part[0] == 0:  # otherwise more of the tensor before
            above = below
            below += _cells(region.whole[0], block[0])
        touched = region.touched(block)
        rows = _stat_rows(region, block, at)
        pieces += _split(region, block, rows, above)
        at += len(touched[0])
        columns = _cells(region.whole[1], block[1])
    is_cut = any(region.size != region.whole for region in regions)
    return SavedGrid(
        layer=layer,
        whole=(below, columns),
        pieces=tuple(pieces),
        first=slot.expert,
        experts=_experts(layer),
        is_cut=is_cut,
    )


def _cells(length: int, step: int) -> int:
    return -(-length // (step or length))


def _experts(layer: QuantLayer) -> int:
    if not layer.grouped:
        return 0
    ep_size: int = mpu.get_expert_model_parallel_world_size()
    return ep_size * len(layer.decisions)


def _stat_rows(region: Region, block: tuple[int, int], at: int) -> tuple[int, ...]:
    """Return the rows of the layer's statistics that belong to the region, in tensor order."""
    if block[0] == 1:  # one row of blocks for each row of the weight, in its order
        return tuple(row for start, stop in region.rows for row in range(start, stop))
    return tuple(range(at, at + len(region.touched(block)[0])))


def _split(
    region: Region, block: tuple[int, int], rows: tuple[int, ...], above: int
) -> list[GridPiece]:
    """Split the blocks that begin in the region from those that begin before it."""
    touched_rows, touched_cols = region.touched(block)
    top, left = touched_rows.start + above, touched_cols.start
    row_step, col_step = (b or n for b, n in zip(block, region.whole, strict=True))
    late_row, late_col = int(region.start[0] % row_step > 0), int(region.start[1] % col_step > 0)
    every = slice(0, len(touched_cols))
    pieces = [
        GridPiece(rows[:late_row], every, (top, left), False),
        GridPiece(rows[late_row:], slice(0, late_col), (top + late_row, left), False),
        GridPiece(
            rows[late_row:],
            slice(late_col, every.stop),
            (top + late_row, left + late_col),
            True,
        ),
    ]
    return [p for p in pieces if p.rows and p.cols.start < p.cols.stop]
