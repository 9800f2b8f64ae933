"""Run calibration text through a model one decoder layer at a time, and measure inputs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch

from megatron_quant.ckpt.storage import give_back
from megatron_quant.errors import CalibrationError
from megatron_quant.models import Param
from megatron_quant.streaming.input_sums import RunningSum, SumsFile
from megatron_quant.streaming.model import keys_of, watched
from megatron_quant.streaming.observe import WeightInputSums
from megatron_quant.streaming.skeleton import CannotWalk, Skeleton
from megatron_quant.streaming.stages import Call, Calls
from megatron_quant.streaming.states import StatesFile
from megatron_quant.streaming.workplace import Come, Workplace


@dataclass(kw_only=True)
class Walk:
    """A walk through the layers with this rank's batches.

    One layer's weights, one batch's hidden states and the masks are in memory at a time.

    Attributes:
        skeleton: The model.
        params: Parameters whose inputs are measured.
        sums: Where squares and products of inputs go; None if none is needed.
        batches: Token ids, int64 [B, S] each.
        place: Where hidden states and progress are kept.
        on_batch: Called with 1 for each batch that a layer has done.
    """

    skeleton: Skeleton
    params: Sequence[Param]
    batches: Sequence[torch.Tensor]
    place: Workplace
    on_batch: Callable[[int], None]
    sums: SumsFile | None = None
    _seen: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Return how many layers have something to measure, or come before one that has."""
        return 1 + max(int(p.layer) for p in self.params if p.layer is not None)

    def run(self) -> dict[str, torch.Tensor]:
        """Return the largest input of each weight by its key; begin where the last run stopped.

        Raises:
            CannotWalk: Where the model cannot be run layer by layer.
            CheckpointError: For a weight that the checkpoint or the model lacks.
            CalibrationError: For inputs that are not finite.
            ExportError: For what the disk refuses.
        """
        watched(self.skeleton.model, self.params)  # raises for a weight that the model lacks
        come = self.place.come()
        if come is None and self.sums is not None:
            self.sums.create()
        if not self.batches:
            return {}
        calls, states, digest = self._enter(write=come is None)
        if come is not None:
            states = self._states(come.layer, states)
            if come.layer < self.layers and not states.is_intact(come.digest):
                come = None
                calls, states, digest = self._enter(write=True)
        if come is None:
            come = Come(0, digest, {})
            self.place.save(come)
        self._seen = {key: torch.tensor(value) for key, value in come.seen.items()}
        self.on_batch(come.layer * len(self.batches))
        for layer in range(come.layer, self.layers):
            states = self._layer(layer, [of_batch[layer] for of_batch in calls], states)
        return self._seen

    def _states(self, layer: int, like: StatesFile) -> StatesFile:
        return StatesFile(self.place.states(layer), like.shapes, like.dtype)

    def _enter(self, write: bool) -> tuple[list[list[Call]], StatesFile, str]:
        """Return each batch's calls, and what enters the first layer, in a file if ``write``."""
        find, calls = Calls(self.skeleton), []
        with torch.no_grad():
            self.skeleton.fill_rest()
            first, _ = find.of(self.batches[0])

            def states() -> Iterator[torch.Tensor]:
                for ids in self.batches:
                    hidden, of_batch = find.of(ids)
                    if hidden.shape[:2] != ids.shape or hidden.shape[2:] != first.shape[2:]:
                        raise CannotWalk(f"{list(hidden.shape)} enters the first layer")
                    calls.append(of_batch)
                    yield hidden

            shapes = [(*ids.shape, *first.shape[2:]) for ids in self.batches]
            file, digest = StatesFile(self.place.states(0), shapes, first.dtype), ""
            if write:
                digest = file.write(states())
            else:
                for _ in states():
                    pass
        self.skeleton.empty()
        give_back()
        return calls, file, digest

    def _layer(self, layer: int, calls: Sequence[Call], states: StatesFile) -> StatesFile:
        """Run a layer over all batches; return its hidden states, not written for the last one."""
        self.skeleton.fill_layer(layer)
        held = watched(self.skeleton.model, self.params)
        sums = dict(self._new_sums(layer))
        real = [w for w in held if w.parameter.device.type != "meta"]
        mode = WeightInputSums(real, {keys_of(p)[0]: found for p, found in sums.values()})

        def made() -> Iterator[torch.Tensor]:
            for call, hidden in zip(calls, states.read(), strict=True):
                with torch.no_grad(), mode:
                    out = call.run(self.skeleton.layers[layer], hidden)
                yield out
                self.on_batch(1)

        later, digest = self._states(layer + 1, states), ""
        if layer + 1 < self.layers:
            digest = later.write(made())
        else:
            for _ in made():
                pass
        self._seen |= self._checked(mode.seen)
        if self.sums is not None:
            self.sums.put({name: found for name, (_, found) in sums.items()})
        self.skeleton.empty()
        give_back()
        if not any(call.hands_on for call in calls):  # else what is handed on is nowhere but here
            seen = {key: value.item() for key, value in self._seen.items()}
            self.place.save(Come(layer + 1, digest, seen))
        states.path.unlink(missing_ok=True)
        return later

    def _new_sums(self, layer: int) -> Iterator[tuple[str, tuple[Param, RunningSum]]]:
        """Yield an empty sum for each slot of a layer that needs one; fused ones share inputs."""
        decisions = self.sums.decisions if self.sums is not None else {}
        for param in self.params:
            decision = decisions.get(param.name)
            if param.layer == layer and decision is not None:
                cols = param.shape[1]
                shape = (cols, cols) if decision.rounds else (cols,)
                yield param.name, (param, RunningSum(torch.zeros(shape)))

    def _checked(self, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Raise CalibrationError at the first layer whose inputs are not finite."""
        for key, value in seen.items():
            if not isfinite(value.item()):
                name = next((p.name for p in self.params if key in keys_of(p)), key)
                raise CalibrationError(
                    f"input of {name} contains NaN or Inf: repair the checkpoint"
                )
        return seen
