"""Import the module of ModelOpt that states its presets, without the rest of ModelOpt.

Importing ``modelopt.torch`` imports Transformer Engine and Megatron where they are installed. A
host without a GPU must be readied for those. The presets need neither.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_quant.errors import RecipeError

_PACKAGE = "modelopt.torch"
_CONFIG = f"{_PACKAGE}.quantization.config"
_PARENTS = (_PACKAGE, f"{_PACKAGE}.opt", f"{_PACKAGE}.quantization", f"{_PACKAGE}.utils")


@lru_cache(maxsize=1)
def modelopt_config() -> Any:
    """Return ``modelopt.torch.quantization.config``.

    It is the imported module, or one of our own that nobody else finds.

    Raises:
        RecipeError: Where ModelOpt is not installed.
    """
    if _CONFIG in sys.modules:
        return sys.modules[_CONFIG]
    try:
        import modelopt
    except ModuleNotFoundError:
        raise RecipeError(
            "presets are ModelOpt's, which is not installed: pip install nvidia-modelopt, or give "
            "a recipe of this library or a .yaml file"
        ) from None
    with _empty_parents(modelopt):
        return import_module(_CONFIG)


@contextmanager
def _empty_parents(modelopt: ModuleType) -> Iterator[None]:
    """Put packages of ModelOpt in place that import nothing, until the end of the block."""
    before = _take(_PACKAGE)
    root = Path(modelopt.__path__[0]).parent
    for name in _PARENTS:
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package
    try:
        yield
    finally:
        _take(_PACKAGE)
        sys.modules.update(before)
        vars(modelopt).pop("torch", None)
        if _PACKAGE in before:
            vars(modelopt)["torch"] = before[_PACKAGE]


def _take(package: str) -> dict[str, ModuleType]:
    """Remove the package and its modules from ``sys.modules``, and return them."""
    names = [n for n in sys.modules if n == package or n.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}
