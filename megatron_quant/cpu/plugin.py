"""Put the kernels into a compiled Transformer Engine, through its own hook.

With ``NVTE_PLUGIN=megatron_quant.cpu.plugin`` in the environment, Transformer Engine imports this
module once its shared libraries are loaded, and calls :func:`load_plugins`. Enums and dispatch are
then its own. :func:`megatron_quant.cpu.activate` sees the variable and does the rest.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from megatron_quant.cpu import kernels, versions
from megatron_quant.errors import HostError

NAME = "megatron_quant.cpu.plugin"
VARIABLE = "NVTE_PLUGIN"
_MODULE = "transformer_engine_torch"
# The function of Transformer Engine's shared library under the name of each kernel.
REPLACED: dict[str, Callable[..., Any]] = {}


def wanted() -> bool:
    """Return whether the environment asks for this plugin."""
    return os.environ.get(VARIABLE) == NAME


def load(version: str) -> None:
    """Import ``transformer_engine.pytorch`` with its shared libraries and this plugin.

    Raises:
        HostError: ``version`` has no such hook, it is not compiled, or it dropped the plugin.
    """
    if versions.numbers(version) < versions.numbers(versions.PLUGIN):
        raise HostError(
            f"{VARIABLE} needs Transformer Engine {versions.PLUGIN}, this is {version}: unset it"
        )
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as e:
        raise HostError(f"{VARIABLE}={NAME} needs a compiled Transformer Engine: {e}") from e
    if not REPLACED:  # Transformer Engine only warns of a plugin that raised
        raise HostError(f"Transformer Engine dropped the plugin {NAME}: see its warning above")


def load_plugins() -> None:
    """Replace the kernels; Transformer Engine calls it before it imports a module of its own."""
    if torch.cuda.is_available():
        raise HostError(f"{VARIABLE}={NAME} on a host with CUDA: unset it")
    module = sys.modules[_MODULE]
    found = {n: f for n, f in vars(module).items() if inspect.isroutine(f) and n[0] != "_"}
    no_backend = vars(module)["NVTE_Fused_Attn_Backend"].NVTE_No_Backend
    ours = kernels.table(no_backend, metadata.version("transformer_engine"))
    lacking = {name: kernels.lacking(name) for name in found.keys() - ours.keys()}
    vars(module).update(lacking | ours)
    REPLACED.update(found)
