"""What lets vLLM build its model classes where no GPU is: nothing that reads or places a weight.

Import it before vLLM. Kernels are not run: classes are built and filled, and no more.
"""

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

_TORCHVISION = ("", ".io", ".ops", ".transforms", ".transforms.v2", ".transforms.v2.functional")


class _AnyType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Anything(metaclass=_AnyType):
    """Has every attribute and takes every call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class _AnyModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Anything,), {})


def stand_in_for_torchvision() -> None:
    """Let vLLM's files of vision models be imported; transformers goes on without torchvision."""
    from transformers.utils.import_utils import is_torchvision_available

    assert not is_torchvision_available()  # and so it stays: the answer is kept
    for name in _TORCHVISION:
        module = _AnyModule(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        sys.modules[module.__name__] = module
        parent, _, own = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


def inspect_classes_here() -> None:
    """Import model classes in this process; vLLM starts one for each, which takes ten seconds."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()


def take_any_experts() -> Callable[[], None]:
    """Say of every kernel for experts that it runs here, and of the platform that it has them.

    Returns what takes the words of the kernels back.
    """
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.platforms import current_platform

    supported = staticmethod(lambda *args, **kwargs: (True, None))
    kernels = (FusedMoEExperts, *_subclasses(FusedMoEExperts))
    own = {k: k.is_supported_config for k in kernels if "is_supported_config" in vars(k)}
    for kernel in own:
        kernel.is_supported_config = supported
    config.current_platform = _But(current_platform, is_cuda_alike=lambda: True)

    def take_back() -> None:
        for kernel, words in own.items():
            kernel.is_supported_config = staticmethod(words)

    return take_back


def take_any_linear() -> None:
    """Say of the kernels for packed weights that they run here, and take any size."""
    from vllm.model_executor.kernels.linear import (
        CPUWNA16LinearKernel,
        MarlinNvFp4LinearKernel,
    )

    MarlinNvFp4LinearKernel.is_supported = staticmethod(lambda *args: (True, None))
    CPUWNA16LinearKernel.can_implement = staticmethod(lambda *args: (True, None))


def take_sparse_attention() -> None:
    """Build sparse attention as what the CPU has for dense."""
    from vllm.platforms.cpu import CpuPlatform

    dense = CpuPlatform.get_attn_backend_cls.__func__

    def chosen(cls: type, selected: Any, attn_selector_config: Any, **rest: Any) -> str:
        return dense(cls, selected, attn_selector_config._replace(use_sparse=False), **rest)

    CpuPlatform.get_attn_backend_cls = classmethod(chosen)


def know_configs(*kinds: str) -> None:
    """Read config.json of model types whose class the hub's repository brings as code."""
    from transformers import AutoConfig, PretrainedConfig

    for kind in kinds:
        own = type(kind, (PretrainedConfig,), {"model_type": kind})
        AutoConfig.register(kind, own)


class _But:
    """An object with some attributes replaced."""

    def __init__(self, wrapped: Any, **replaced: Callable[[], Any]) -> None:
        self._wrapped = wrapped
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _subclasses(cls: type) -> Iterator[type]:
    for own in cls.__subclasses__():
        yield own
        yield from _subclasses(own)
