"""A loop that loads a checkpoint without quantizers into a model that has them.

Megatron-Bridge (``pretrained_checkpoint``) and Megatron-LM (``--load ... --finetune``) load after
they wrapped the model, and ask the checkpoint for all that the model has.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_quant.mcore.checkpoint import CHILD

_HIDDEN = ("_quantizer.", "_extra_state", f"{CHILD}.")


def keys_apart(chunks: Sequence[Any]) -> bool:
    """Return whether Megatron saves each layer under a key of its own, as ModelOpt has it do."""
    return bool(chunks[0].config.hetereogenous_dist_checkpoint)


def accept_plain(chunks: Sequence[nn.Module], apart: bool) -> None:
    """Have the chunks look unquantized to what loads or saves them, until they are trained.

    apart: what :func:`keys_apart` returned before they were quantized.
    """
    for chunk in chunks:
        _Plain(chunk, apart)


class _Plain:
    """Hides the quantizers of one chunk until its first forward in training."""

    def __init__(self, chunk: Any, apart: bool) -> None:
        self._chunk = chunk
        self._apart = apart
        self._sharded = chunk.sharded_state_dict
        chunk.sharded_state_dict = self._without
        self._hooks = [
            chunk.register_load_state_dict_post_hook(_forgive),
            chunk.register_forward_pre_hook(self._begin),
        ]

    def _without(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        config = self._chunk.config
        now = config.hetereogenous_dist_checkpoint
        config.hetereogenous_dist_checkpoint = self._apart
        try:
            state: dict[str, Any] = self._sharded(*args, **kwargs)
        finally:
            config.hetereogenous_dist_checkpoint = now
        return {name: held for name, held in state.items() if not _is_hidden(name)}

    def _begin(self, chunk: nn.Module, args: Any) -> None:
        if chunk.training:
            del self._chunk.sharded_state_dict
            for hook in self._hooks:
                hook.remove()


def _forgive(chunk: nn.Module, incompatible: Any) -> None:
    """Leave the quantizers out of what a state dict lacks."""
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not _is_hidden(k)]


def _is_hidden(name: str) -> bool:
    return any(part in name for part in _HIDDEN)
