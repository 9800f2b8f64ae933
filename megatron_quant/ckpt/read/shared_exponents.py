"""Check E8M0 scales, the exponents that blocks of OCP's microscaling formats share.

On disk they are uint8 or torch's own dtype. Code 255 is NaN, which no block may have.
"""

from pathlib import Path

import torch
from torch import Tensor

from megatron_quant.errors import CheckpointError
from megatron_quant.formats import Format

_NAN = 255
_SCALE_BITS = (8, 0)  # of exponent and mantissa


def is_e8m0(tensor: Tensor, fmt: Format | None = None, field: str = "") -> bool:
    """Return whether ``tensor`` holds E8M0, by its dtype or because it is ``field`` of ``fmt``."""
    if tensor.dtype == torch.float8_e8m0fnu:
        return True
    by_format = fmt is not None and fmt.scale_bits == _SCALE_BITS and field == "scale"
    return by_format and tensor.dtype == torch.uint8


def nan_of_e8m0(name: str, scales: Tensor) -> str:
    """Return the fault of E8M0 scales as one line; empty if all are numbers."""
    if not (scales.view(torch.uint8) == _NAN).any():
        return ""
    return f"{name}: holds the E8M0 code {_NAN}, which is NaN and no scale"


def check_e8m0(path: Path, name: str, scales: Tensor) -> None:
    """Raise CheckpointError if a scale is NaN."""
    if fault := nan_of_e8m0(name, scales):
        raise CheckpointError(
            f"{path}: {fault}; fetch the checkpoint again, or quantize the original anew"
        )
