"""A host without a GPU: the classes of Transformer Engine and Megatron-Core on CPU tensors.

One class hierarchy runs everywhere, Transformer Engine's own. What its shared libraries do on a GPU
is done here by torch operations, for the kernels that float32, bfloat16 and float16 forward and
backward of a Megatron model need. This room is the only one that replaces anything in another
library, and only :func:`activate` does so: importing it changes nothing.

Written for Transformer Engine 2.20.2 (the pure-Python wheel is enough; shared libraries are not
loaded even where they are installed) and Megatron-Core 0.16.1 to 0.19.2.
"""

import sys
import warnings
from importlib import metadata

import torch

from megatron_quant.cpu import binary, cuda, kernels, megatron
from megatron_quant.errors import HostError

TE_VERSION = "2.20.2"
MEGATRON_VERSIONS = ("0.16.1", "0.19.2")
_EARLIER = ("transformer_engine", "megatron.core", "modelopt.torch")
_active = False


def activate() -> None:
    """Make this process run Transformer Engine and Megatron-Core on CPU tensors; idempotent.

    It must come before the first import of transformer_engine, megatron.core or modelopt.torch:
    each of them decides while it is imported what the host can do.

    Raises:
        HostError: CUDA is available, one of those libraries was imported already, or one of them
            is missing.
    """
    global _active
    if _active:
        return
    _check_host()
    _check_versions()
    binary.load()
    cuda.answer()
    cuda.scope_transformer_engine()
    megatron.replace()
    _active = True


def calls() -> dict[str, int]:
    """How often each kernel has run in this process, by Transformer Engine's name for it."""
    return dict(kernels.CALLS)


def transformer_config_overrides() -> dict[str, object]:
    """The fields of Megatron's TransformerConfig that this host decides.

    Fused paths that are CUDA code or compile at run time are off, and weights are created in host
    memory. Every value is valid for the versions named above.
    """
    return {
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "moe_permute_fusion": False,
        "moe_router_fusion": False,
    }


def _check_host() -> None:
    if torch.cuda.is_available():
        raise HostError(
            "cpu.activate() on a host with CUDA: leave it out, the installed Transformer Engine"
            " is used there (or hide the GPU with CUDA_VISIBLE_DEVICES='')"
        )
    for name in _EARLIER:
        if name in sys.modules:
            raise HostError(
                f"{name} was imported before cpu.activate(): activate first, then import {name}"
            )


def _check_versions() -> None:
    te = _version("transformer_engine", f"transformer-engine=={TE_VERSION}")
    core = _version("megatron-core", f"megatron-core=={MEGATRON_VERSIONS[0]}")
    first, last = (_numbers(v) for v in MEGATRON_VERSIONS)
    if te != TE_VERSION:
        warnings.warn(
            f"cpu was tested with Transformer Engine {TE_VERSION}, not {te}", stacklevel=3
        )
    if not first <= _numbers(core) <= last:
        tested = " to ".join(MEGATRON_VERSIONS)
        warnings.warn(f"cpu was tested with Megatron-Core {tested}, not {core}", stacklevel=3)


def _version(distribution: str, requirement: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise HostError(f"{distribution} is not installed: pip install {requirement}") from None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
