"""The arguments that each decoder layer is called with, found by the model's own forward.

The forward runs with a stand-in in place of every layer, which keeps its arguments and returns the
hidden states as they are. So embeddings, masks and positions are the model's own.
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from megatron_quant.streaming.model import one_line
from megatron_quant.streaming.skeleton import CannotWalk, Skeleton

_HIDDEN, _CACHE = "hidden_states", "past_key_values"
_LIKE = 16
"""Tensors of one shape that others are compared with: a mask a kind of attention, and the like."""


@dataclass(frozen=True)
class Call:
    """The arguments of a layer besides the hidden states, which come first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Return the hidden states that ``layer`` makes of ``hidden``.

        Args:
            layer: The layer.
            hidden: What enters it, [B, S, H].
            cache: Given what the layer would cache, in place of transformers' cache; None for none.

        Raises:
            CannotWalk: Where they have another shape, or the layer takes no cache.
        """
        kwargs = self.kwargs
        if cache is not None:
            if kwargs.get(_CACHE, cache) is not None:
                raise CannotWalk("its layers take no cache")
            kwargs = {**kwargs, _CACHE: cache}
        out = layer(hidden, *self.args, **kwargs)
        made: torch.Tensor = out[0] if isinstance(out, tuple) else out
        if made.shape != hidden.shape or made.dtype != hidden.dtype:
            raise CannotWalk(f"a layer turns {list(hidden.shape)} into {list(made.shape)}")
        return made

    @property
    def handed(self) -> list[MutableMapping[Any, Any]]:
        """Return where layers leave something for later ones, such as keys and values."""
        values = (*self.args, *self.kwargs.values())
        return [v for v in values if isinstance(v, MutableMapping)]

    @property
    def hands_on(self) -> bool:
        """Return whether a layer has left something for a later one."""
        return any(len(v) > 0 for v in self.handed)


def _alone(hidden: torch.Tensor) -> Any:
    return hidden


def _in_tuple(hidden: torch.Tensor) -> Any:
    return (hidden,)


@dataclass
class Calls:
    """Finds the calls of batches. Tensors that are equal in all of them are kept once."""

    skeleton: Skeleton
    _kept: dict[tuple[Any, ...], list[torch.Tensor]] = field(default_factory=dict)
    _give: Callable[[torch.Tensor], Any] = _alone

    def of(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Return the hidden states that enter the first layer, and each layer's call.

        Args:
            ids: Token ids, int64 [B, S].

        Raises:
            CannotWalk: For a model whose layers do not simply follow one another.
        """
        try:
            return self._try(ids)
        except CannotWalk as reason:
            self._give = _in_tuple  # perhaps its layers return tuples
            try:
                return self._try(ids)
            except CannotWalk:
                raise reason from None

    def last(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return what enters the output layer, [B, S, H], from what leaves the last layer.

        Raises:
            CannotWalk: Where the model's forward fails.
        """
        base = self.skeleton.model.base_model
        found: torch.Tensor = self._run(base, ids, lambda *args: hidden).last_hidden_state
        return found

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, S, V] that a model with an output layer makes of hidden states.

        Args:
            ids: Token ids, int64 [B, S].
            hidden: What its last layer makes of them.

        Raises:
            CannotWalk: Where the model's forward fails.
        """
        logits: torch.Tensor = self._run(self.skeleton.model, ids, lambda *args: hidden).logits
        return logits

    def _try(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        recorder = _Recorder(self._once)
        self._run(self.skeleton.model.base_model, ids, recorder.record)
        if len(recorder.calls) != len(self.skeleton.layers) or recorder.hidden is None:
            raise CannotWalk("its forward does not run every layer once")
        return recorder.hidden, recorder.calls

    def _run(self, model: nn.Module, ids: torch.Tensor, stage: "_OnStage") -> Any:
        """Run a forward with a stand-in for every layer, which returns what ``stage`` does."""

        def given(*args: Any) -> Any:
            return self._give(stage(*args))

        layers = self.skeleton.layers
        self.skeleton.put([_Stage(layer, i, given) for i, layer in enumerate(layers)])
        try:
            return model(input_ids=ids, use_cache=False)
        except CannotWalk:
            raise
        except Exception as e:  # a model's code may need what is not loaded
            raise CannotWalk(one_line(e)) from e
        finally:
            self.skeleton.put(layers)

    def _once(self, value: Any) -> Any:
        """Return ``value``, or an equal tensor that is kept already."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type == "meta":
            raise CannotWalk("its forward needs weights outside of the text decoder")
        kept = self._kept.setdefault((value.shape, value.dtype), [])
        for other in kept:
            if other is value or torch.equal(other, value):
                return other
        if len(kept) < _LIKE:
            kept.append(value)
        return value


_OnStage = Callable[[int, tuple[Any, ...], dict[str, Any]], torch.Tensor]
"""(a layer's number, its arguments) -> hidden states."""


@dataclass
class _Recorder:
    """Keeps the arguments of the layers in their order."""

    once: Callable[[Any], Any]
    hidden: torch.Tensor | None = None
    calls: list[Call] = field(default_factory=list)

    def record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop(_HIDDEN, None)
        if index != len(self.calls) or not isinstance(hidden, torch.Tensor):
            raise CannotWalk("its forward does not run the layers one after another")
        if self.hidden is None:
            self.hidden = hidden
        elif not _is_same(hidden, self.hidden):
            raise CannotWalk("its forward changes the hidden states between layers")
        self.calls.append(Call(*pytree.tree_map(self.once, (args, kwargs))))
        return hidden


def _is_same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Return whether both are the same elements in memory: a slice of everything is."""
    places = [(t.data_ptr(), t.shape, t.stride()) for t in (one, two)]
    return places[0] == places[1]


class _Stage(nn.Module):
    """A stand-in for a layer, with the layer's attributes."""

    def __init__(self, layer: nn.Module, index: int, run: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__ |= {"_layer": layer, "_index": index, "_run": run}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what stands for the layer's hidden states."""
        return self.__dict__["_run"](self.__dict__["_index"], args, kwargs)
