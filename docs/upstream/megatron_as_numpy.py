"""Megatron-Core: the alltoall dispatcher's split sizes become numpy arrays on a GPU only.

python docs/upstream/megatron_as_numpy.py
"""

import importlib

import tiny_moe as tiny

# isort: split
import torch
from megatron.core.transformer.moe import token_dispatcher

importlib.reload(token_dispatcher)  # Megatron's own functions again
found = type(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 1]), as_numpy=True))
tiny.finish(
    "as_numpy=True gives a numpy.ndarray, as on a GPU",
    f"{found.__module__}.{found.__name__} for a tensor that lies on the host already",
    found is torch.Tensor,
)
