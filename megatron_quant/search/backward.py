"""Score all places by gradients, a layer at a time: backward from the last layer to the first.

Each layer is loaded, run again over what entered it, and gone back through from the gradient of
what it returned. The gradient of what entered it is kept for the layer before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_quant.ckpt.read import CacheScales
from megatron_quant.ckpt.storage import give_back
from megatron_quant.search.cache import WatchedCache
from megatron_quant.search.handed import Handed
from megatron_quant.search.loss import Loss, check_loss, check_score
from megatron_quant.search.progress import Progress
from megatron_quant.search.scoring import quantized, scored
from megatron_quant.search.weights import Fit, PlaceWeights
from megatron_quant.streaming import Borders, StatesFile


@dataclass(kw_only=True)
class Backward:
    """A backward over this rank's batches.

    Attributes:
        borders: What a forward left, with all hidden states.
        fit: The places.
        loss: The loss whose gradients score.
        files: Layer -> the file for the gradients of what enters it; of the number of layers, for
            those of what leaves the last.
        cache_scales: Scales of a calibrated KV cache, by layer.
        progress: Where scores are kept, fp64 [batches, options of all places].
        on_batch: Called with 1 for each batch that a layer, or the output layer, has done.
    """

    borders: Borders
    fit: Fit
    loss: Loss
    files: Callable[[int], Path]
    cache_scales: CacheScales
    progress: Progress
    on_batch: Callable[[int], None]
    _handed: list[Handed] = field(default_factory=list)

    def run(self) -> torch.Tensor:
        """Return the scores, fp64 [batches, options of all places]; go on where a run stopped.

        Raises:
            CannotWalk: Where the model cannot be run layer by layer.
            CalibrationError: If the loss or a score is not finite.
            ExportError: For what the disk refuses.
        """
        borders, top = self.borders, self.borders.layers
        found, come = self.progress.read()
        at = int(come.get("layer", top + 1))
        if at <= top and not self._gradients(at).is_intact(str(come.get("digest"))):
            found, at = torch.zeros_like(found), top + 1
        self._handed = [Handed() for _ in borders.batches]
        self.on_batch((top + 1 - at) * len(borders.batches))
        for layer in range(at - 1, -1, -1):
            of_layer = found.clone()
            digest = self._gradients(layer).write(self._step(layer, of_layer))
            borders.skeleton.empty()
            give_back()
            found = of_layer
            if not borders.hands_on:  # else gradients of what is handed on are nowhere but here
                self.progress.save(found, layer=layer, digest=digest)
            if layer < top:
                self._gradients(layer + 1).path.unlink(missing_ok=True)
        return found

    def _gradients(self, layer: int) -> StatesFile:
        like = self.borders.states(layer)
        return StatesFile(self.files(layer), like.shapes, like.dtype)

    def _step(self, layer: int, found: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the gradient of what enters a layer, batch by batch; add to the scores."""
        borders, top = self.borders, layer == self.borders.layers
        if top:
            borders.skeleton.fill_rest()
        else:
            borders.skeleton.fill_layer(layer)
        places = self.fit.at(None if top else layer)
        columns = self.fit.problem.columns
        coming = borders.states(layer).read()
        gradients = iter(()) if top else self._gradients(layer + 1).read()
        for batch, hidden in enumerate(coming):
            own = [(w, found[batch, columns[w.place.name]]) for w in places]
            with scored(borders.skeleton.model, own):
                if top:
                    made = self._of_loss(batch, hidden)
                else:
                    made = self._of_layer(layer, batch, hidden, next(gradients), found)
            for weights, scores in own:
                _check(weights, scores)
            yield made
            self.on_batch(1)

    def _of_loss(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        ids, hidden = self.borders.batches[batch], hidden.requires_grad_()
        value = self.loss(self.borders.find.logits(ids, hidden).float(), ids)
        check_loss(value.item())
        value.backward()
        assert hidden.grad is not None
        return hidden.grad

    def _of_layer(
        self,
        layer: int,
        batch: int,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        found: torch.Tensor,
    ) -> torch.Tensor:
        skeleton, problem = self.borders.skeleton, self.fit.problem
        call, cache, place = self.borders.calls[batch][layer], None, problem.cache
        rounding = [o for o in place.options if o.changes] if place is not None else []
        changed = torch.zeros(len(rounding), dtype=torch.float64)
        if rounding:
            scales = [self.cache_scales if o.kv_cache == "fp8" else None for o in rounding]
            cache = WatchedCache(skeleton.model, scales, changed)
        made = self._handed[batch].backward(call, skeleton.layers[layer], hidden, gradient, cache)
        if place is not None:
            scores = found[batch, problem.columns[place.name]]
            for option, change in zip(rounding, changed, strict=True):
                i = place.options.index(option)
                scores[i] += change
                check_score("gradient", scores[i].item(), place.name, option.action)
        return made


def _check(weights: PlaceWeights, scores: torch.Tensor) -> None:
    for i, rule in quantized(weights):
        check_score("gradient", scores[i].item(), weights.place.name, rule.action)
