"""Run the classes of Transformer Engine and Megatron-Core on CPU tensors, without a GPU.

One class hierarchy runs everywhere, Transformer Engine's own. Torch operations replace those GPU
kernels that a float32, bfloat16 or float16 forward and backward of a Megatron model needs. Only
this room replaces anything in another library, and only when :func:`activate` is called: importing
it changes nothing.

Written for Transformer Engine 2.10.0 to 2.20.2 (the pure-Python wheel is enough; shared libraries
are loaded only where :mod:`megatron_quant.cpu.plugin` is asked for) and Megatron-Core 0.16.1 to
0.19.2. What differs between them is in :mod:`megatron_quant.cpu.versions`.
"""

import sys
import warnings
from importlib import metadata

import torch

from megatron_quant.cpu import (
    binary,
    context,
    cuda,
    delta_net,
    kernels,
    megatron,
    optimizer,
    plugin,
    versions,
)
from megatron_quant.errors import HostError

_EARLIER = ("transformer_engine", "megatron.core", "modelopt.torch")
_active = False


def use_cpu() -> None:
    """Ready this process for a host without a GPU; do nothing where CUDA is available.

    Call it before anything imports Megatron or Transformer Engine.

    Raises:
        HostError: Where one of them was imported already, or is missing.
    """
    if not torch.cuda.is_available():
        activate()


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
    version = metadata.version("transformer_engine")
    (plugin if plugin.wanted() else binary).load(version)
    cuda.answer()
    cuda.scope_transformer_engine(version)
    cuda.name_transformer_engine()
    megatron.replace()
    context.replace()
    delta_net.replace()
    optimizer.replace()
    _active = True


def calls() -> dict[str, int]:
    """Return how often each kernel ran in this process, by Transformer Engine's name for it."""
    return dict(kernels.CALLS)


def transformer_config_overrides() -> dict[str, object]:
    """Return the fields of Megatron's TransformerConfig that this host decides.

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
            "cpu.activate() on a host with CUDA: leave it out, because the installed Transformer"
            " Engine is used there (or hide the GPU with CUDA_VISIBLE_DEVICES='')"
        )
    for name in _EARLIER:
        if name in sys.modules:
            raise HostError(
                f"{name} was imported before cpu.activate(): activate first, then import {name}"
            )


def _check_versions() -> None:
    for library in versions.LIBRARIES:
        found = _version(library)
        if not library.tested(found):
            warnings.warn(
                f"cpu was tested with {library.title} {library.first} to {library.last},"
                f" not {found}",
                stacklevel=3,
            )


def _version(library: versions.Library) -> str:
    name = library.distribution
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        raise HostError(f"{name} is not installed: pip install {library.requirement}") from None
