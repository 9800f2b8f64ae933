"""View a checkpoint's stacks of experts as the single experts that engines load."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_quant.ckpt.read.source import Listed, TensorInfo, Weights
from megatron_quant.models import Box, View, is_draft, unstack


@dataclass(frozen=True, kw_only=True)
class Viewed(Listed):
    """``stored``, with the tensors of ``views`` instead of the stacks that hold them."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    stored: Weights
    views: Mapping[str, View]

    @property
    def unread(self) -> tuple[str, ...]:
        """Return the viewed checkpoint's own unread tensors."""
        return self.stored.unread

    @property
    def is_bare(self) -> bool:
        """Return whether the viewed files' names lack ``model.``."""
        return isinstance(self.stored, Listed) and self.stored.is_bare

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Read only ``box`` of tensor ``name``, in the form that ``stored`` gives."""
        view = self.views.get(name)
        if view is None:
            return self.stored.read(name, box)
        part = self.stored.read(view.stored, view.box(box))[0]
        if view.transposed:
            part = part.t()
        return part[:: view.step].contiguous()


W = TypeVar("W", bound=Weights)


def viewed(checkpoint: W, views: Mapping[str, View]) -> W | Viewed:
    """View ``checkpoint``; return it unchanged if there are no views."""
    if not views:
        return checkpoint
    stored = checkpoint.dense()
    stacks = {view.stored for view in views.values()}
    tensors = {n: info for n, info in stored.items() if n not in stacks}
    for name, view in views.items():
        tensors[name] = replace(stored[view.stored], shape=view.shape)
    return Viewed(
        path=checkpoint.path,
        config=checkpoint.config,
        tensors=tensors,
        stored=checkpoint,
        views=views,
    )


def unstacked(checkpoint: Weights) -> Weights:
    """Return the checkpoint by engines' names, without knowing what its tensors mean.

    Stacks of layers for speculation are carried as they are, so they stay stacks.

    Raises ArchitectureError for a stack whose experts cannot be told apart.
    """
    config, stored = checkpoint.config, checkpoint.dense()
    shapes = {name: info.shape for name, info in stored.items() if not is_draft(config, name)}
    return viewed(checkpoint, unstack(config, shapes))


def stacked(
    views: Mapping[str, View],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Put single experts back into the stacks that ``views`` finds them in.

    Args:
        views: View of each expert's tensor, by its name.
        shapes: Shapes of the stacks.
        read: Gives an expert's tensor.
    """
    found: dict[str, torch.Tensor] = {}
    for name, view in views.items():
        tensor = read(name)
        if view.stored not in found:
            found[view.stored] = tensor.new_empty(shapes[view.stored])
        whole = view.box(Box((0,) * len(view.shape), view.shape))
        part = found[view.stored][whole.index][0]
        (part.t() if view.transposed else part)[:: view.step].copy_(tensor)
    return found
