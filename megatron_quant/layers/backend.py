"""Let ModelOpt's quantizers compute with our codecs.

ModelOpt owns the quantizer object: what is on, its amax, its name in state dicts. The numbers come
from :mod:`megatron_quant.formats` through ModelOpt's public backend seam. So a forward sees what an
export stores, on every device.

A weight quantizer knows which regions of logical tensors its weight holds. It may have a buffer
``_block_amax``: the statistics of all blocks that those regions touch, fp32 [N_b, K_b, P], region
after region by rows; a stack of experts has its number as the first dim. Without that buffer block
scales follow from the values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    is_registered_quant_backend,
    unregister_quant_backend,
)
from torch import nn

from megatron_quant.errors import CalibrationError
from megatron_quant.formats import (
    CHANNEL,
    Format,
    Region,
    block_stat,
    fake_quant,
    fake_quant_on,
    get_format,
    put_together,
    scales_of,
    tensor_scale,
    with_signed_scales,
)

BACKEND = "megatron_quant"
_SHARE = "_share"  # a quantizer's child that says what its weight holds
AMAX, BLOCK_AMAX = "_amax", "_block_amax"  # a quantizer's buffers: ModelOpt's, and ours


def quantizer_attributes(fmt: Format, axis: int | None = None) -> dict[str, Any]:
    """Return the attribute config of a ModelOpt ``TensorQuantizer`` that stores in ``fmt``.

    ``axis``: the dim with one amax per index (0 for one per expert of a stack); None for a single
    amax. Block formats are ``dynamic``: their block scales follow from the values. ModelOpt's
    summaries describe a format by these attributes; the backend computes by the format's name.
    """
    return {
        "num_bits": fmt.float_bits or fmt.bits,
        "block_sizes": _block_sizes(fmt),
        "enable": True,
        "axis": axis,
        "backend": BACKEND,
        "backend_extra_args": {
            "format": fmt.name,
            "group_size": fmt.group_size,
            "signed": fmt.signed,
        },
    }


def _block_sizes(fmt: Format) -> dict[Any, Any] | None:
    if fmt.group_size in (0, CHANNEL):
        return None
    sizes: dict[Any, Any] = {-1: fmt.group_size, "type": "dynamic"}
    if fmt.scale_bits is not None:
        sizes["scale_bits"] = fmt.scale_bits
    return sizes


def quantizer_format(quantizer: TensorQuantizer) -> Format:
    """Return the format that :func:`quantizer_attributes` gave the quantizer."""
    args = quantizer.backend_extra_args
    fmt = get_format(args["format"], args["group_size"])
    return with_signed_scales(fmt) if args.get("signed") else fmt


@dataclass(frozen=True)
class KeptGrid:
    """Scales that a weight quantizer was given, in the form of ``formats.grid``.

    regions: the parts of logical tensors that the weight holds, in the order of its rows. scales:
    each region's, by field; for a stack of experts their number is the first dim.
    """

    fmt: Format
    regions: tuple[Region, ...]
    scales: tuple[Mapping[str, torch.Tensor], ...]

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Round ``weight`` [N, K] or [E, N, K] to the nearest values on the grid."""
        parts = [
            fake_quant_on(region.take(weight), self.fmt, scales, _origin(region))
            for region, scales in zip(self.regions, self.scales, strict=True)
        ]
        return with_rest(put_together(parts, self.regions), weight)


def with_rest(rounded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``rounded``, which may be the first rows of a weight alone, with the other rows."""
    rows = rounded.shape[-2]
    if rows == weight.shape[-2]:
        return rounded
    return torch.cat([rounded, weight[..., rows:, :].to(rounded.dtype)], -2)


class _Share(nn.Module):
    """Holds what a weight quantizer knows of this rank's share of its weight.

    It is a module without parameters or buffers. So no state dict has it, neither torch's nor
    ModelOpt's, but a copy of the model does.
    """

    def __init__(
        self,
        regions: Sequence[Region] = (),
        grid: KeptGrid | None = None,
        on_grid: bool = False,
    ) -> None:
        super().__init__()
        self.regions, self.grid, self.on_grid = tuple(regions), grid, on_grid


_NOTHING = _Share()


def set_regions(
    quantizer: TensorQuantizer, regions: Sequence[Region], on_grid: bool = False
) -> None:
    """Tell a weight quantizer what its weight holds, as ``formats.blocks.region.grids`` takes it.

    The regions depend on this rank's layout, so no state dict has them. An earlier grid is dropped.
    """
    quantizer.add_module(_SHARE, _Share(regions, on_grid=on_grid))


def regions_of(quantizer: TensorQuantizer) -> tuple[Region, ...]:
    """Return the regions that :func:`set_regions` set; empty for inputs."""
    return _share_of(quantizer).regions


def set_grid(quantizer: TensorQuantizer, grid: KeptGrid) -> None:
    """Make a weight quantizer round onto ``grid``, whatever its statistics."""
    quantizer.add_module(_SHARE, _Share(regions_of(quantizer), grid))


def grid_of(quantizer: TensorQuantizer) -> KeptGrid | None:
    """Return the grid that :func:`set_grid` set; None if scales follow from statistics."""
    return _share_of(quantizer).grid


def _share_of(quantizer: TensorQuantizer) -> _Share:
    return getattr(quantizer, _SHARE, _NOTHING)


def set_block_amax(quantizer: TensorQuantizer, stat: torch.Tensor) -> None:
    """Give a weight quantizer the statistics of its blocks, in place of any it has.

    They depend on this rank's layout, so no state dict has them.
    """
    quantizer.register_buffer(BLOCK_AMAX, stat, persistent=False)


def block_amax(quantizer: TensorQuantizer) -> torch.Tensor | None:
    """Return the statistics of its blocks; None if they follow from the weight."""
    return getattr(quantizer, BLOCK_AMAX, None)


def reset_block_amax(quantizer: TensorQuantizer) -> None:
    """Let the statistics of its blocks follow from the weight again."""
    if block_amax(quantizer) is not None:
        delattr(quantizer, BLOCK_AMAX)


def split_stat(stat: torch.Tensor, regions: Sequence[Region], fmt: Format) -> list[torch.Tensor]:
    """Split statistics [..., N_b, K_b, P] of all regions into those of each."""
    assert fmt.stat_block is not None
    counts = [len(region.touched(fmt.stat_block)[0]) for region in regions]
    return [own.contiguous() for own in stat.split(counts, dim=-3)]


def _fake_quantize(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    grid = grid_of(quantizer)
    if grid is not None:
        return grid.rounded(inputs)
    fmt = quantizer_format(quantizer)
    dscale = _dscale(quantizer, fmt) if fmt.tensor_scale else None
    regions = regions_of(quantizer)
    if not regions:
        return fake_quant(inputs, fmt, dscale, _short_blocks(inputs, fmt))
    stat = block_amax(quantizer)
    stats = [None] * len(regions) if stat is None else split_stat(stat, regions, fmt)
    rounded = _on_grid if _share_of(quantizer).on_grid else fake_quant
    parts = [
        rounded(region.take(inputs), fmt, dscale, stat, _origin(region))
        for region, stat in zip(regions, stats, strict=True)
    ]
    return with_rest(put_together(parts, regions), inputs)


def _on_grid(
    w: torch.Tensor,
    fmt: Format,
    dscale: torch.Tensor | None,
    stat: torch.Tensor | None,
    origin: tuple[int, int],
) -> torch.Tensor:
    """Round so that values which lie on the grid already keep their codes."""
    return fake_quant_on(w, fmt, scales_of(w, fmt, dscale, stat, origin), origin)


def _short_blocks(x: torch.Tensor, fmt: Format) -> torch.Tensor | None:
    """Return the statistics of inputs whose last block is short; None if all blocks are full.

    Every rank scales its own columns, as engines do: blocks start at its first column.
    """
    short = fmt.group_size > 0 and x.shape[-1] % fmt.group_size
    return block_stat(x, fmt) if short else None


def _origin(region: Region) -> tuple[int, int]:
    return region.start[0], region.start[1]


def _dscale(quantizer: TensorQuantizer, fmt: Format) -> torch.Tensor:
    if quantizer.amax is None:
        raise CalibrationError(
            f"a {fmt.name} quantizer was used before it had an amax: calibrate the model first"
        )
    return tensor_scale(quantizer.amax.float(), fmt)


def register_backend() -> None:
    """Register ``backend="megatron_quant"`` with ModelOpt; a second call does nothing."""
    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, _fake_quantize)


def unregister_backend() -> None:
    """Remove the backend from ModelOpt; a second call does nothing."""
    unregister_quant_backend(BACKEND)
