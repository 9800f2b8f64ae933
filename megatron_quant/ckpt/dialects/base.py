"""What a dialect is: the names, shapes and directions in which engines read a format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_quant.formats.spec import WHOLE, Format
from megatron_quant.recipes.plan import QuantPlan

INPUT_SCALE = "input_scale"
"""Pseudo field: the activations' tensor scale (multiply to dequantize), fp32, 0-dim."""
SHAPE = "shape"
"""Pseudo field: the weight's [N, K] as int64 [2]."""


def same(tensor: torch.Tensor) -> torch.Tensor:
    """The value as the codec made it."""
    return tensor


@dataclass(frozen=True)
class Stored:
    """One tensor that a dialect writes for a quantized module ``P``: ``P.suffix``.

    field: the codec's field that it carries, or ``INPUT_SCALE`` or ``SHAPE``.
    block: as :attr:`megatron_quant.formats.spec.Field.block`, for the tensor as stored.
    scalar_shape: shape on disk where ``block`` is ``(WHOLE, WHOLE)``.
    to_disk, from_disk: between the codec's value and the stored one, on any slice of them.
    """

    suffix: str
    field: str
    dtype: torch.dtype
    block: tuple[int, int]
    scalar_shape: tuple[int, ...] = ()
    to_disk: Callable[[torch.Tensor], torch.Tensor] = same
    from_disk: Callable[[torch.Tensor], torch.Tensor] = same

    def shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Shape on disk for a weight of ``rows`` x ``cols``."""
        if self.block == (WHOLE, WHOLE):
            return self.scalar_shape
        block_rows, block_cols = (b or n for b, n in zip(self.block, (rows, cols), strict=True))
        return (-(-rows // block_rows), -(-cols // block_cols))


@dataclass(frozen=True)
class ModuleFormat:
    """What a quantized checkpoint's own config says of one module."""

    weights: Format
    inputs: Format | None


class Dialect(Protocol):
    """One on-disk convention, in both directions.

    extra_names: JSON files that a checkpoint of the dialect has beside config.json.
    """

    name: str
    extra_names: tuple[str, ...]

    def stored(self, weights: Format, inputs: Format | None) -> tuple[Stored, ...]:
        """Tensors of a module in these formats; FormatError where the dialect has none."""
        ...

    def quantization_config(self, plan: QuantPlan) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""
        ...

    def extra_files(self, plan: QuantPlan) -> dict[str, dict[str, Any]]:
        """Other JSON files of the dialect: file name -> content."""
        ...

    def check_extra_files(
        self, config: Mapping[str, Any], files: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """What the dialect's other JSON files say otherwise than ``quantization_config``.

        files: content of ``extra_names``, by name.
        """
        ...

    def read_config(
        self, config: Mapping[str, Any], modules: tuple[str, ...]
    ) -> dict[str, ModuleFormat]:
        """Of ``modules`` (Hugging Face names), those that ``quantization_config`` quantizes."""
        ...
