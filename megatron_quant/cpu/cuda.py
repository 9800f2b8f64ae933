"""Answer for ``torch.cuda`` on this host, and pass a CPU tensor for a CUDA one where needed.

Two kinds of replacement are kept apart. Process-wide ones are answers without which Megatron-Core
and Transformer Engine do not run a step: the current device is the CPU, streams do nothing, the
random generator is the CPU's. Only while one of the Transformer Engine functions runs that insist
on it, CUDA seems available and a CPU tensor seems to lie on it.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_quant.cpu import versions

CPU = torch.device("cpu")
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_MODULES = "transformer_engine.pytorch.module"
_ATTENTION = "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
# (module, class, methods) that test for CUDA or spell out device="cuda".
_SCOPED = (
    (f"{_MODULES}.base", "TransformerEngineBaseModule", ("prepare_forward",)),
    (f"{_MODULES}.linear", "Linear", ("__init__",)),
    (f"{_MODULES}.layernorm_linear", "LayerNormLinear", ("__init__",)),
    (f"{_MODULES}.grouped_linear", "GroupedLinear", ("__init__",)),
    (f"{_MODULES}.grouped_linear", "_GroupedLinear", ("backward",)),
    (_ATTENTION, "DotProductAttention", ("__init__", "forward")),
)


class Stream:
    """A stream or an event of a host that runs everything in order: every request is done."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "Stream"]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def answer() -> None:
    """Replace the process-wide answers."""
    stream = Stream()
    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream=None: nullcontext(),
        "Stream": Stream,
        "Event": Stream,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            major=8, minor=0, multi_processor_count=1, name="cpu"
        ),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda new_state, device=None: torch.set_rng_state(new_state),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment]


def scope_transformer_engine(version: str) -> None:
    """Wrap the functions of Transformer Engine ``version`` that take only CUDA tensors."""
    managers = versions.context_managers(version)
    for module, owner, methods in _SCOPED:
        cls = getattr(importlib.import_module(module), owner)
        for method in methods:
            wrap = _scoped_entry if f"{owner}.{method}" in managers else _scoped
            is_static = isinstance(vars(cls)[method], staticmethod)
            wrapped = wrap(getattr(cls, method))
            setattr(cls, method, staticmethod(wrapped) if is_static else wrapped)


def name_transformer_engine() -> None:
    """Have the placeholders of fused weight gradients, on ``device="cuda"``, lie on the CPU."""
    for name in ("linear", "layernorm_linear", "grouped_linear"):
        module = importlib.import_module(f"{_MODULES}.{name}")
        module.get_dummy_wgrad = named(module.get_dummy_wgrad)  # type: ignore[attr-defined]


@contextmanager
def pretended() -> Iterator[None]:
    """Pretend that CUDA is available, every tensor is on it, and ``device="cuda"`` is the CPU."""
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        with _CudaIsCpu():
            yield
    finally:
        torch.cuda.is_available = available


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` so that ``device="cuda"`` is the CPU, and pretend nothing else."""

    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with _CudaNamesCpu():
            return function(*args, **kwargs)

    return scoped


class _CudaNamesCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return func(*args, **kwargs)


class _CudaIsCpu(_CudaNamesCpu):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func == _IS_CUDA else super().__torch_function__(func, types, args, kwargs)


class CudaTypes(_CudaNamesCpu):
    """A mode in which ``device="cuda"`` is the CPU, and a tensor's type is CUDA's of its dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        names_type = func == torch.Tensor.type and isinstance(found, str)
        return found.replace("torch.", "torch.cuda.", 1) if names_type else found


def _names_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _scoped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with pretended():
            return function(*args, **kwargs)

    return scoped


def _scoped_entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that returns a context manager: entering it is scoped, its body is not."""

    @contextmanager
    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            with pretended():
                value = stack.enter_context(function(*args, **kwargs))
            yield value

    return scoped
