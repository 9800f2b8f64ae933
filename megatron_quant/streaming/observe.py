"""Observe inputs of linears by the weight that they are multiplied with.

A dispatch mode sees every matrix product of a forward. A factor in the storage of a watched
parameter is a weight. Where the parameter is a stack of experts, its offset tells the expert. The
other factor is its input. So no module is replaced and no weight changed, however the model's code
spells its linears.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_quant.formats import amax

_FACTORS: dict[Callable[..., Any], tuple[int, int]] = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.baddbmm.default: (1, 2),
    torch.ops.aten.linear.default: (0, 1),
}
"""Product -> indices of the two arguments that it multiplies."""


@dataclass(frozen=True)
class Watched:
    """A parameter: one weight [N, K], or a stack of them whose first dim tells ``keys`` apart."""

    parameter: torch.Tensor
    keys: tuple[str, ...]


class WeightInputAmax(TorchDispatchMode):
    """A mode that keeps the largest magnitude of the inputs of each watched weight.

    Attributes:
        seen: Key -> fp32 []. A weight without inputs is missing, and so is one of a stack that got
            only zeros: some models give these for tokens that go to other experts.
    """

    def __init__(self, watched: Iterable[Watched]) -> None:
        super().__init__()
        self.seen: dict[str, torch.Tensor] = {}
        self._by_storage = {w.parameter.untyped_storage().data_ptr(): w for w in watched}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the factors of a product, and compute it."""
        at = _FACTORS.get(func)
        if at is not None:
            left, right = args[at[0]], args[at[1]]
            self._look(left, right)
            self._look(right, left)
        return func(*args, **(kwargs or {}))

    def _look(self, x: torch.Tensor, w: torch.Tensor) -> None:
        """Record ``x`` as an input where ``w`` is a watched weight, or several."""
        watched = self._by_storage.get(w.untyped_storage().data_ptr())
        if watched is None or not x.numel():
            return
        parameter, keys = watched.parameter, watched.keys
        each = parameter.numel() // len(keys)
        first = (w.storage_offset() - parameter.storage_offset()) // each
        count = max(w.numel() // each, 1)
        parts = [x] if count == 1 else list(x.unbind(0))
        assert len(parts) == count, (x.shape, w.shape, keys[0])
        for key, part in zip(keys[first : first + count], parts, strict=True):
            self._add(key, amax(part), alone=len(keys) == 1)

    def _add(self, key: str, found: torch.Tensor, alone: bool) -> None:
        if found != 0 or alone:
            self.seen[key] = torch.maximum(self.seen.get(key, found), found)
