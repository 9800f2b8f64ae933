"""Find the inputs of weights in a forward, by the weight that they are multiplied with.

A dispatch mode sees every matrix product. A factor that lies in a watched parameter is a weight. If
the parameter is a stack of experts, the offset tells the expert. The other factor is its input. So
no module is replaced and no weight changed, however the model's code spells its linears.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OnInput = Callable[[str, torch.Tensor], torch.Tensor | None]

_FACTORS: dict[Callable[..., Any], tuple[int, int]] = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.baddbmm.default: (1, 2),
}
"""Product -> indices of the two arguments that it multiplies."""


@dataclass(frozen=True)
class Watched:
    """A parameter: one weight [N, K], or a stack of them with one of ``keys`` per first index."""

    parameter: torch.Tensor
    keys: tuple[str, ...]


class WeightInputs(TorchDispatchMode):
    """A mode that hands the inputs of watched weights to a function while it is entered.

    Args:
        watched: Parameters that hold the weights. Each must start at an address of its own.
        on_input: Called with a weight's key and an input [T, K] of it, T > 0, in every product. A
            stack's expert may get rows of zeros for tokens that go to other experts. The function
            returns None, or a tensor of the same shape and dtype to multiply instead. Its own
            products are not observed. None for a subclass that overrides :meth:`on_input`: a mode
            that held its own method would hold the weights until Python looks for cycles.
    """

    def __init__(self, watched: Iterable[Watched], on_input: OnInput | None = None) -> None:
        super().__init__()
        self._on_input = on_input
        self._by_storage: dict[int, list[Watched]] = {}
        for w in sorted(watched, key=_offset):
            self._by_storage.setdefault(_storage(w.parameter), []).append(w)

    def on_input(self, key: str, x: torch.Tensor) -> torch.Tensor | None:
        """Hear an input [T, K] of the weight of ``key``; return None or its replacement."""
        return self._on_input(key, x) if self._on_input else None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the factors of a product, and compute it."""
        at = _FACTORS.get(func)
        if at is None:
            with self:  # in inference mode, linear and matmul arrive before they are mm
                found = func.decompose(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if found is NotImplemented else found
        left, right = (args[i] for i in at)
        changed = list(args)
        changed[at[0]] = self._seen(left, right)
        changed[at[1]] = self._seen(right.mT, left).mT
        return _product(func, changed, at[0], kwargs or {})

    def _seen(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Hand over ``x`` if ``w`` is one or several watched weights; return its replacement."""
        watched = self._find(w)
        if watched is None or not x.numel():
            return x
        parameter, keys = watched.parameter, watched.keys
        each = parameter.numel() // len(keys)
        first = (w.storage_offset() - parameter.storage_offset()) // each
        count = max(w.numel() // each, 1)
        parts = [x] if count == 1 else list(x.unbind(0))
        assert len(parts) == count, (x.shape, w.shape, keys[0])
        found = [
            self.on_input(key, part)
            for key, part in zip(keys[first : first + count], parts, strict=True)
        ]
        if all(new is None for new in found):
            return x
        new = [old if part is None else part for old, part in zip(parts, found, strict=True)]
        return new[0] if count == 1 else torch.stack(new)

    def _find(self, w: torch.Tensor) -> Watched | None:
        """Return the parameter of ``w``'s storage that starts last before it, and reaches it."""
        at = self._by_storage.get(_storage(w))
        if at is None:
            return None
        index = bisect_right(at, w.storage_offset(), key=_offset) - 1
        found = at[index] if index >= 0 else None
        if found is None or w.storage_offset() >= _offset(found) + found.parameter.numel():
            return None
        return found


def _product(func: Any, args: list[Any], left: int, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Multiply; on a CPU in 16 bits, with rows of zeros that bring their number to a usual one.

    oneDNN makes code for every number of rows, a quarter to half a megabyte that stays. Experts get
    another number of tokens in each batch.
    """
    x, rows = args[left], len(args[left])
    more = _usual(rows) - rows
    alike = x.dim() == 2 and all(other.dim() == 1 for other in args[:left])
    if not more or not alike or x.device.type != "cpu" or x.itemsize != 2:
        return func(*args, **kwargs)  # type: ignore[no-any-return]
    filled = torch.cat([x, x.new_zeros(more, x.shape[1])])
    return func(*args[:left], filled, *args[left + 1 :], **kwargs)[:rows]  # type: ignore[no-any-return]


def _usual(rows: int) -> int:
    """Return the next number that has three binary digits before its zeros: 8, 10, 12, 14, 16."""
    step = 1 << max((rows - 1).bit_length() - 3, 0)
    return -(-rows // step) * step


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _offset(watched: Watched) -> int:
    return int(watched.parameter.storage_offset())
