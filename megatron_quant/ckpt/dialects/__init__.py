"""On-disk conventions, by name. The names are there without torch; the dialects need it."""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_quant.errors import FormatError

if TYPE_CHECKING:
    from megatron_quant.ckpt.dialects.base import Dialect

    DIALECTS: dict[str, Dialect]

_CLASSES = {
    "modelopt": ("modelopt", "ModelOpt"),
    "compressed-tensors": ("compressed_tensors", "CompressedTensors"),
    "gptq": ("gptq", "Gptq"),
    "awq": ("awq", "Awq"),
    "auto-round": ("auto_round", "AutoRound"),
    "fp8": ("native_fp8", "NativeFp8"),
}
"""Name -> the module and the class of the dialect."""
NAMES = tuple(_CLASSES)
"""What ``--export-format`` may be."""


def get_dialect(name: str) -> "Dialect":
    """The dialect called ``name``; FormatError lists the known ones."""
    if name not in _CLASSES:
        raise FormatError(f"unknown export format {name!r}; known: {', '.join(NAMES)}")
    return _made(name)


@cache
def _made(name: str) -> "Dialect":
    module, cls = _CLASSES[name]
    made: Dialect = getattr(import_module(f"{__name__}.{module}"), cls)()
    assert made.name == name, (made.name, name)
    return made


def __getattr__(name: str) -> Any:
    if name != "DIALECTS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    dialects = {name: _made(name) for name in NAMES}
    globals()["DIALECTS"] = dialects
    return dialects
