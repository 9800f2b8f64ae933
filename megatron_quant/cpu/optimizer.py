"""Megatron-Core's optimizers on CPU tensors.

They take parameters of ``torch.cuda`` types alone, make scalars on ``device="cuda"``, and step and
scale with Transformer Engine's fused kernels. torch's AdamW and the plain versions that
Megatron-Core itself has for hosts without those kernels take their place.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_quant.cpu import cuda

_METHODS = ("__init__", "step", "state_dict", "load_state_dict", "sharded_state_dict")


def replace() -> None:
    """Import megatron.core.optimizer and put the CPU versions in its modules."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as steps

    optimizer.Adam, optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizer.USING_PYTORCH_OPTIMIZER = True
    for module in (clip_grads, steps):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.multi_tensor_scale_tensor_impl = None  # read from 0.19 on: it scales by a number
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    for owner in _owners(optimizer):
        for method in _METHODS:
            if method in vars(owner):
                setattr(owner, method, _typed(vars(owner)[method]))


def _owners(module: Any) -> list[type]:
    """List the optimizer classes that a module names, and their bases that are optimizers."""
    found = [c for _, c in inspect.getmembers(module, inspect.isclass)]
    bases = {base for c in found if issubclass(c, module.MegatronOptimizer) for base in c.mro()}
    return sorted((b for b in bases if issubclass(b, module.MegatronOptimizer)), key=str)


def _typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function``: ``device="cuda"`` is the CPU, and CPU tensors state types of CUDA ones."""

    @functools.wraps(function)
    def typed(*args: Any, **kwargs: Any) -> Any:
        with cuda.CudaTypes():
            return function(*args, **kwargs)

    return typed
