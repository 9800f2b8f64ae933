"""Run Megatron-Core's gated delta nets without flash-linear-attention, which needs a GPU.

Megatron-Core has a torch version of the recurrence, for its deterministic mode, but builds the
layer only where it finds that package. Names of the package stand in its module: torch functions
replace them. Methods that Megatron-Core compiles on their first call run as they are written.
"""

import importlib
import inspect
from types import ModuleType

import torch
import torch.nn.functional as F

_MODULES = (
    "megatron.core.ssm.gated_delta_net",
    "megatron.core.ssm.gated_delta_net.common",  # from 0.17 on
    "megatron.core.ssm.gated_delta_net.gdn",
)
_ATTENTION = "megatron.core.transformer.attention"
"""Its output gate is compiled too."""


def replace() -> None:
    """Put the torch versions into megatron.core's modules; leave them where the package is."""
    modules = [module for name in _MODULES if (module := _found(name)) is not None]
    for module in [*modules, importlib.import_module(_ATTENTION)]:
        for _, owner in inspect.getmembers(module, inspect.isclass):
            if owner.__module__ == module.__name__:
                _uncompile(owner)
    if any(getattr(module, "HAVE_FLA", False) for module in modules):
        return
    for module in modules:
        for name, value in _names(module).items():
            setattr(module, name, value)


def _found(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _names(module: ModuleType) -> dict[str, object]:
    return {
        "HAVE_FLA": True,
        "l2norm": _l2norm,
        "causal_conv1d": _causal_conv1d,
        "chunk_gated_delta_rule": getattr(module, "torch_chunk_gated_delta_rule", None),
    }


def _uncompile(owner: type) -> None:
    for name, method in list(vars(owner).items()):
        inner = getattr(method, "_torchdynamo_orig_callable", None)
        if inner is not None:
            setattr(owner, name, inner)


def _l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """Return ``x`` over its length along ``dim``."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(dim, keepdim=True) + eps)).to(x.dtype)


def _causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **of_packed_sequences: object,
) -> tuple[torch.Tensor, None]:
    """Return the convolution of x [B, S, D] with [D, kernel] over no later tokens, and no state."""
    kernel = weight.shape[-1]
    y = F.conv1d(F.pad(x.mT, (kernel - 1, 0)), weight[:, None], bias, groups=len(weight)).mT
    return F.silu(y) if activation in ("silu", "swish") else y, None
