"""Number formats: pure functions between a tensor and what a checkpoint stores of it.

What computes needs torch and is imported where it is first asked for: what only names formats,
as recipes do, starts without it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_quant.formats.spec import FORMATS, Field, Format, get_format

if TYPE_CHECKING:
    from megatron_quant.formats.amax import amax, stack_amax, tensor_scale
    from megatron_quant.formats.codec import decode, encode
    from megatron_quant.formats.fake_quant import fake_quant
    from megatron_quant.formats.stat import block_stat

__all__ = [
    "FORMATS",
    "Field",
    "Format",
    "amax",
    "block_stat",
    "decode",
    "encode",
    "fake_quant",
    "get_format",
    "stack_amax",
    "tensor_scale",
]

_FUNCTIONS = {
    "amax": "amax",
    "stack_amax": "amax",
    "tensor_scale": "amax",
    "decode": "codec",
    "encode": "codec",
    "fake_quant": "fake_quant",
    "block_stat": "stat",
}
"""Function -> the module that has it."""


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    globals()[name] = found
    return found


class _Face(ModuleType):
    """This package, in which ``amax`` and ``fake_quant`` are the functions.

    Importing a module sets it as an attribute of its package, also where a function has its name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
