"""What Megatron-Bridge needs on a host without a GPU; importing it puts it in place.

Ranks are forks of a process that imported it. None of this is in the package: on a GPU, Bridge runs
as it is.
"""

import functools
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from tests.dist import cpu_adam  # noqa: F401


# Its training names the device "cuda" wherever it makes a tensor.
class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


_CudaIsCpu().__enter__()

# Its resiliency extension is a package of CUDA; in-process restarts, which are off, are of it.
if not find_spec("nvidia_resiliency_ext"):
    for name in ("", ".inprocess"):
        module = ModuleType(f"nvidia_resiliency_ext{name}")
        module.CallWrapper = object
        sys.modules[module.__name__] = module
    sys.modules["nvidia_resiliency_ext"].inprocess = sys.modules["nvidia_resiliency_ext.inprocess"]


# gloo scatters contiguous tensors alone; its shards of columns are views.
def _contiguous(scatter: Any) -> Any:
    @functools.wraps(scatter)
    def scattered(tensor: Any, scatter_list: Any = None, **keywords: Any) -> Any:
        parts = scatter_list and [part.contiguous() for part in scatter_list]
        return scatter(tensor, parts, **keywords)

    return scattered


dist.scatter = _contiguous(dist.scatter)
# What it compiles at run time would look for a GPU.
torch._dynamo.config.disable = True

torch.cuda.set_device = lambda device: None
torch.cuda.empty_cache = lambda: None

from megatron.bridge.training import initialize, pretrain, setup  # noqa: E402, F401

# megatron-core's wheel brings its index builder compiled, without the makefile to do it again.
initialize.compile_helpers = lambda: None
# Its set-up does not begin where there is no CUDA.
setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
