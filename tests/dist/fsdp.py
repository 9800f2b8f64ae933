"""Megatron-FSDP's own saving, on a host without a GPU.

Import it in functions that run under the ``ranks`` fixture: it changes torch for the whole process.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.transformer import fsdp_dtensor_checkpoint
from megatron.core.distributed import DistributedDataParallelConfig, FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import (
    preprocess_state_dict_for_uneven_dtensor,
)
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_swiglu_in_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from tests.dist import live, training


SPLITS_DELTA_NETS = hasattr(fsdp_dtensor_checkpoint, "handle_gdn_in_state_dict")
"""Whether this release saves their parts under keys of their own."""


# It names the device "cuda", in its meshes too.
class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        named = [isinstance(arg, torch.device) and arg.type == "cuda" for arg in args]
        return func(*("cpu" if n else a for n, a in zip(named, args, strict=True)), **kwargs)


class _NoStream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


_from_group = DeviceMesh.from_group


def _of_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
    return _from_group(group, "cpu", *args, **kwargs)


def save(source: Path, folder: Path) -> None:
    """Save the weights of ``source`` as a run of Megatron-LM with ``fsdp_dtensor`` does.

    The steps are those of core_v0.16.1 (``preprocess_fsdp_dtensor_state_dict``) and later.
    """
    (chunk,) = training.build(source, live.Parallelism(), torch.bfloat16)
    config = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        use_distributed_optimizer=True,
        data_parallel_sharding_strategy="optim_grads_params",
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    _CudaIsCpu().__enter__()
    DeviceMesh.from_group = staticmethod(_of_cpu)
    torch.cuda.current_device = lambda: 0
    torch.cuda.Stream = _NoStream
    model = FullyShardedDataParallel(chunk.config, config, chunk)
    state = model.state_dict_for_save_checkpoint()
    handle_fp8_extra_state_case(state)
    state, _ = handle_swiglu_in_state_dict(model, state, None)
    if SPLITS_DELTA_NETS:
        state, _ = fsdp_dtensor_checkpoint.handle_gdn_in_state_dict(model, state, None)
    state = handle_experts_in_state_dict(state, chunk.config.num_moe_experts)
    whole = {"model": state, "iteration": 5}
    preprocess_state_dict_for_uneven_dtensor(whole)
    dcp.save(whole, storage_writer=dcp.FileSystemWriter(folder))
