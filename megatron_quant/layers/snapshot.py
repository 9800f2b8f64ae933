"""Turn converted modules back into what they were."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def as_before(models: Sequence[nn.Module]) -> Iterator[None]:
    """Give all modules of ``models``, on exit, the classes and attributes that they have now.

    Submodules, parameters, buffers and hooks count as attributes. Values of tensors do not.
    """
    found = {id(m): m for model in models for m in model.modules()}
    kept = [(module, type(module), _attributes(module)) for module in found.values()]
    try:
        yield
    finally:
        for module, kind, attributes in kept:
            object.__setattr__(module, "__class__", kind)
            _restore(module, attributes)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Return each attribute, and a copy of what it holds if it is a dict."""
    return {
        name: (value, dict(value) if isinstance(value, dict) else None)
        for name, value in vars(module).items()
    }


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, dict[Any, Any] | None]]) -> None:
    vars(module).clear()
    for name, (value, content) in attributes.items():
        if content is not None:
            value.clear()
            value.update(content)
        vars(module)[name] = value
