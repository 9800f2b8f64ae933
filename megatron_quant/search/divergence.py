"""Measure what changes of a model do to its logits, a layer at a time.

Each change has a stream of hidden states of its own, which begins at the first layer that it is in.
All streams of a group go through a layer while it is loaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_quant.ckpt.storage import give_back
from megatron_quant.evaluation import nll_and_kl
from megatron_quant.recipes import Rule
from megatron_quant.search.ablation import ablated
from megatron_quant.search.handed import lent
from megatron_quant.search.progress import Progress
from megatron_quant.search.weights import Fit, PlaceWeights
from megatron_quant.streaming import Borders, StatesFile

_LEAST = 16


@dataclass(frozen=True)
class Change:
    """Says what is rounded at once.

    Attributes:
        rules: How places of weights are rounded, by name.
        cache: Makes the KV cache that rounds keys and values; None to leave them.
    """

    rules: Mapping[str, Rule]
    cache: Callable[[], Any] | None = None


def streams_at_once(layers: int, changes: int) -> int:
    """Return how many streams of a model are held at a time: about as many as it has layers."""
    return min(changes, max(layers, _LEAST))


@dataclass(kw_only=True)
class Divergences:
    """The divergence of each change, on this rank's batches.

    Attributes:
        borders: What a forward left, with all hidden states.
        fit: The places.
        changes: The changes.
        files: (change, layer) -> the file for what enters that layer.
        progress: Where divergences are kept, fp64 [batches, changes].
        on_batch: Called with the batches that a layer, or the output layer, has done.
    """

    borders: Borders
    fit: Fit
    changes: Sequence[Change]
    files: Callable[[int, int], Path]
    progress: Progress
    on_batch: Callable[[int], None]
    _at: dict[int, tuple[int, str]] = field(default_factory=dict)
    _own: dict[tuple[int, int], dict[Any, Any]] = field(default_factory=dict)

    @cached_property
    def first(self) -> list[int]:
        """Return the layer at which each change begins; the number of layers for the output's."""
        layer_of = {p.name: self.fit.layer_of(p) for p in self.fit.problem.places if not p.cached}

        def of(change: Change) -> int:
            layers = [layer_of[name] for name in change.rules]
            found = [layer for layer in layers if layer is not None]
            return 0 if change.cache else min(found, default=self.borders.layers)

        return [of(change) for change in self.changes]

    @property
    def steps(self) -> int:
        """Return how often a layer runs over a batch, the output layer included."""
        layers = [1 + self.borders.layers - first for first in self.first]
        return len(self.borders.batches) * sum(layers)

    def run(self) -> torch.Tensor:
        """Return sums of the KL divergence over tokens, in nats: fp64 [batches, changes].

        It goes on where a run stopped.

        Raises:
            CannotWalk: Where the model cannot be run layer by layer.
            ExportError: For what the disk refuses.
        """
        found, come = self.progress.read()
        done = {int(c) for c in come.get("done", ())}
        at = come.get("at", {})
        self._at = {int(c): (int(layer), str(digest)) for c, (layer, digest) in at.items()}
        self._at = {
            c: (layer, digest)
            for c, (layer, digest) in self._at.items()
            if self._stream(c, layer).is_intact(digest)
        }
        order = sorted(range(len(self.changes)), key=lambda c: (self.first[c], c))
        step = streams_at_once(self.borders.layers, len(order))
        for group in (order[i : i + step] for i in range(0, len(order), step)):
            if done.issuperset(group):
                continue
            for layer in range(self.first[group[0]], self.borders.layers):
                self._through(layer, group, found, done)
            with torch.no_grad():
                self._measure(group, found)
            done |= set(group)
            ended = [self._stream(c, self._at.pop(c)[0]) for c in group if c in self._at]
            self._own.clear()
            self._save(found, done)
            for file in ended:
                file.path.unlink(missing_ok=True)
        return found

    def _stream(self, change: int, layer: int) -> StatesFile:
        like = self.borders.states(layer)
        if layer == self.first[change]:
            return like
        return StatesFile(self.files(change, layer), like.shapes, like.dtype)

    def _save(self, found: torch.Tensor, done: set[int]) -> None:
        at = {} if self.borders.hands_on else self._at  # what is handed on is nowhere but here
        self.progress.save(found, done=sorted(done), at=at)

    def _layer_of(self, change: int) -> int:
        return self._at[change][0] if change in self._at else self.first[change]

    def _through(
        self, layer: int, group: Sequence[int], found: torch.Tensor, done: set[int]
    ) -> None:
        """Take the streams of a group that have come to a layer through it."""
        coming = [c for c in group if self._layer_of(c) == layer]
        if not coming:
            return
        self.borders.skeleton.fill_layer(layer)
        places = {w.place.name: w for w in self.fit.at(layer)}
        for change in coming:
            before = self._stream(change, layer)
            with torch.no_grad(), ablated(self._chosen(change, places)):
                digest = self._stream(change, layer + 1).write(self._made(change, layer, before))
            self._at[change] = (layer + 1, digest)
            self._save(found, done)
            if layer > self.first[change]:
                before.path.unlink(missing_ok=True)
        self.borders.skeleton.empty()
        give_back()

    def _chosen(
        self, change: int, places: Mapping[str, PlaceWeights]
    ) -> list[tuple[PlaceWeights, Rule]]:
        rules = self.changes[change].rules
        return [(places[name], rule) for name, rule in rules.items() if name in places]

    def _made(self, change: int, layer: int, before: StatesFile) -> Iterator[torch.Tensor]:
        module, cache = self.borders.skeleton.layers[layer], self.changes[change].cache
        for batch, hidden in enumerate(before.read()):
            call = self.borders.calls[batch][layer]
            with lent(call, self._own.setdefault((change, batch), {})):
                made = call.run(module, hidden, cache() if cache else None)
            yield made
            self.on_batch(1)

    def _measure(self, group: Sequence[int], found: torch.Tensor) -> None:
        """Compare the logits of a group with those of the unquantized model."""
        top, find = self.borders.layers, self.borders.find
        self.borders.skeleton.fill_rest()
        places = {w.place.name: w for w in self.fit.at(None)}
        streams = {c: self._stream(c, top).read() for c in group}
        for batch, hidden in enumerate(self.borders.states(top).read()):
            ids = self.borders.batches[batch]
            before = find.logits(ids, hidden).flatten(0, 1)
            for change in group:
                with ablated(self._chosen(change, places)):
                    after = find.logits(ids, next(streams[change])).flatten(0, 1)
                found[batch, change] = nll_and_kl(after, before, ids.flatten()).kl
                self.on_batch(1)
        self.borders.skeleton.empty()
        give_back()
