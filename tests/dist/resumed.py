"""What a resumed run is compared by, whichever program trained it. Imports no Megatron."""

from collections.abc import Mapping
from pathlib import Path

import torch


def ranges(source: Path, stored: Path) -> tuple[dict[str, float], dict[str, float]]:
    """A checkpoint's ranges of weights, and the weights' own maxima."""
    from tests.dist import training

    return training.stored_ranges(source, stored, "fp8")


def farthest(
    found: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor]
) -> tuple[float, str]:
    """The largest relative distance between tensors of two exports, scales of inputs aside."""
    distances = []
    for name in (name for name in whole if "input_scale" not in name):
        one, other = whole[name].float(), found[name].float()
        distances.append((float((one - other).norm() / one.norm()), name))
    return max(distances)
