"""The table of kernels that have a CPU version, and the count of their calls.

A kernel has the name and the arguments of the ``transformer_engine_torch`` function that it
replaces, since Transformer Engine's Python passes most of them by position.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from megatron_quant.cpu import gemm, norm, softmax, versions
from megatron_quant.errors import HostError

CALLS: Counter[str] = Counter()

_KERNELS: dict[str, Callable[..., Any]] = {
    "generic_gemm": gemm.generic_gemm,
    "te_general_grouped_gemm": gemm.te_general_grouped_gemm,
    "rmsnorm_fwd": norm.rmsnorm_fwd,
    "rmsnorm_bwd": norm.rmsnorm_bwd,
    "layernorm_fwd": norm.layernorm_fwd,
    "layernorm_bwd": norm.layernorm_bwd,
    "scaled_softmax_forward": softmax.scaled_softmax_forward,
    "scaled_softmax_backward": softmax.scaled_softmax_backward,
    "scaled_masked_softmax_forward": softmax.scaled_masked_softmax_forward,
    "scaled_masked_softmax_backward": softmax.scaled_softmax_backward,
    "scaled_upper_triang_masked_softmax_forward": softmax.causal_softmax_forward,
    "scaled_upper_triang_masked_softmax_backward": softmax.scaled_softmax_backward,
    "scaled_aligned_causal_masked_softmax_forward": softmax.causal_softmax_forward,
    "scaled_aligned_causal_masked_softmax_backward": softmax.scaled_softmax_backward,
}


def table(no_backend: Any, version: str) -> dict[str, Callable[..., Any]]:
    """Map name to function, for Transformer Engine ``version``.

    Besides the kernels, these are the questions that Transformer Engine asks of its libraries.

    Args:
        no_backend: Member of NVTE_Fused_Attn_Backend that means none.
        version: Version of Transformer Engine.
    """
    attention = versions.fused_attention_answer(version, no_backend)
    answers: dict[str, Callable[..., Any]] = {
        "get_num_cublas_streams": lambda: 1,
        "get_cudnn_version": lambda: 92000,
        "get_cublasLt_version": lambda: 130100,
        "get_fused_attn_backend": lambda *args: attention,
    }
    return answers | {name: _counted(name, kernel) for name, kernel in _KERNELS.items()}


def lacking(name: str) -> Callable[..., Any]:
    """Return a function that raises HostError with the kernel's name when it is called."""

    def raise_lacking(*args: object, **kwargs: object) -> None:
        raise HostError(
            f"Transformer Engine's kernel {name} has no CPU version: switch off the option that"
            " calls it, or run on a GPU"
        )

    return raise_lacking


def _counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        with torch.no_grad():
            return kernel(*args, **kwargs)

    return counted
