"""A model's tensors as values that travel from the ranks to the test."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """A rank's box of a global tensor."""

    name: str
    shape: tuple[int, ...]
    box: tuple[slice, ...]
    values: torch.Tensor


def assemble(held: Iterable[Piece]) -> dict[str, torch.Tensor]:
    """The whole tensors from the pieces of all ranks; what no rank holds is NaN."""
    whole: dict[str, torch.Tensor] = {}
    for piece in held:
        empty = torch.full(piece.shape, torch.nan, dtype=piece.values.dtype)
        box = whole.setdefault(piece.name, empty)[piece.box]
        box.copy_(piece.values.reshape(box.shape))
    return whole
