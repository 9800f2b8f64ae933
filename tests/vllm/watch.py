"""What becomes of a checkpoint's tensors while vLLM loads them, under vLLM's own Python.

vLLM's loader copies each into a parameter, or cuts, turns and joins it before. Every torch function
is watched: a result belongs to the tensors that it was made of, and a copy into a parameter takes
them. So a tensor that nothing takes, a parameter that nothing fills, and a copy that casts codes to
another type are seen, whatever the loader reports.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CODES = (torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32)
"""Types of quantized values; a copy from or into one must keep it."""


class Watch(TorchFunctionMode):
    """Follows tensors by their storage.

    given, taken: names of the checkpoint's tensors, and of those that were copied. filled: storages
    that were written from them. cast: copies that changed the type of codes, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.filled: set[int] = set()
        self.taken: set[str] = set()
        self.given: set[str] = set()
        self.cast: list[str] = []
        self._names: dict[int, set[str]] = {}
        self._alive: list[torch.Tensor] = []  # so that no address is used twice

    def given_by(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a checkpoint's tensors, each in a storage of its own."""
        for name, tensor in tensors:
            with torch._C.DisableTorchFunctionSubclass():
                own = tensor.clone()
            self.given.add(name)
            self._belongs(own, {name})
            yield name, own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = self._of(args) | self._of((kwargs or {}).values())
        found = func(*args, **(kwargs or {}))
        if names:
            written = func in (torch.Tensor.copy_, torch.Tensor.__setitem__, _SET_DATA)
            if written and isinstance(args[0], torch.Tensor):
                self._copied(args[0], args[-1], names)
            for result in found if isinstance(found, tuple | list) else (found,):
                if isinstance(result, torch.Tensor):
                    self._belongs(result, names)
        return found

    def _copied(self, to: torch.Tensor, source: Any, names: set[str]) -> None:
        self.filled.add(_storage(to))
        self.taken |= names
        types = {source.dtype, to.dtype} if isinstance(source, torch.Tensor) else set()
        if len(types) == 2 and not types.isdisjoint(CODES):
            self.cast += [f"{n}: {source.dtype} into {to.dtype}" for n in sorted(names)]

    def _belongs(self, tensor: torch.Tensor, names: set[str]) -> None:
        self._names.setdefault(_storage(tensor), set()).update(names)
        self._alive.append(tensor)

    def _of(self, values: Iterable[Any]) -> set[str]:
        names: set[str] = set()
        for value in values:
            if isinstance(value, tuple | list):
                names |= self._of(value)
            elif isinstance(value, torch.Tensor):
                names |= self._names.get(_storage(value), set())
        return names


_SET_DATA = torch.Tensor.data.__set__


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().data_ptr()
