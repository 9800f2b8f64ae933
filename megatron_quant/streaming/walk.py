"""Run calibration text through a model one decoder layer at a time, and measure inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite

import torch
from torch import nn

from megatron_quant.ckpt.storage import give_back
from megatron_quant.errors import CalibrationError
from megatron_quant.models import Param, Role
from megatron_quant.streaming.behind import RoundedLayers
from megatron_quant.streaming.caches import CacheAmax
from megatron_quant.streaming.forced import forced_experts
from megatron_quant.streaming.input_sums import RunningSum, SumsFile
from megatron_quant.streaming.model import input_keys, keys_of, watched
from megatron_quant.streaming.observe import Seen, WeightInputSums
from megatron_quant.streaming.skeleton import CannotWalk, Skeleton
from megatron_quant.streaming.stages import Call, Calls
from megatron_quant.streaming.states import StatesFile
from megatron_quant.streaming.workplace import Come, Workplace


@dataclass(frozen=True, kw_only=True)
class Borders:
    """The borders that a walk leaves behind, to run its layers again.

    Attributes:
        skeleton: The model.
        find: What makes logits of what leaves the last layer.
        calls: Each layer's call, of each batch.
        batches: Token ids, int64 [B, S] each.
        states: Layer -> the hidden states that enter it; of the number of layers, those that leave
            the last.
    """

    skeleton: Skeleton
    find: Calls
    calls: Sequence[Sequence[Call]]
    batches: Sequence[torch.Tensor]
    states: Callable[[int], StatesFile]

    @property
    def layers(self) -> int:
        """Return how many layers there are."""
        return len(self.skeleton.layers)

    @property
    def hands_on(self) -> bool:
        """Return whether layers have left something for later ones in memory."""
        return any(call.hands_on for of_batch in self.calls for call in of_batch)


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
        caches: Layer -> cache slots of its keys and values, where these are measured.
        expert_share: Share of a layer's experts that each token is given to while those are
            measured; None for the experts that the router chose.
        input_amax: Amax of inputs by slot, fp32 [], where their scale counts for what codes lose.
        keep: Keep the hidden states at every border, from those that enter the first layer to those
            that leave the last.
        behind: The layers once they are quantized by their sums, which the layers after them are
            measured behind; None to measure all behind the checkpoint's own.
    """

    skeleton: Skeleton
    params: Sequence[Param]
    batches: Sequence[torch.Tensor]
    place: Workplace
    on_batch: Callable[[int], None]
    sums: SumsFile | None = None
    caches: Mapping[int, Sequence[str]] = field(default_factory=dict)
    expert_share: float | None = None
    input_amax: Mapping[str, torch.Tensor] = field(default_factory=dict)
    behind: RoundedLayers | None = None
    keep: bool = False
    _seen: Seen = field(default_factory=Seen)
    _digests: list[str] = field(default_factory=list)
    _kept: list[str] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """Return how many layers have something to measure, or come before one that has."""
        every = len(self.skeleton.layers)
        return every if self.keep else min(every, steps(self.params, self.caches, every))

    @property
    def _handed_on(self) -> int:
        """Return how many layers there are whose hidden states are read again."""
        return self.layers if self._heads or self.keep else self.layers - 1

    @property
    def _heads(self) -> list[Param]:
        return [p for p in self.params if p.role is Role.OUTPUT]

    def run(self) -> tuple[Seen, "Borders | None"]:
        """Return what the inputs of weights were, and the borders; begin where a run stopped.

        Of the borders only those that are kept have their hidden states. None without batches.

        Raises:
            CannotWalk: Where the model cannot be run layer by layer.
            CheckpointError: For a weight that the checkpoint or the model lacks.
            CalibrationError: For inputs that are not finite.
            ExportError: For what the disk refuses.
        """
        watched(self.skeleton.model, self.params)  # raises for a weight that the model lacks
        come = self.place.come()
        if come is not None and not self._has_sums(come):
            come = None
        if come is None and self.sums is not None:
            self.sums.create()
        if not self.batches:
            self._help_others(self.layers)
            return self._seen, None
        find, calls, states, digest = self._enter(write=come is None)
        if come is not None and not self._has_states(come, states):
            come = None
            find, calls, states, digest = self._enter(write=True)
        if come is None:
            come = Come(layer=0, digest=digest, kept=[digest] if self.keep else [])
            self.place.save(come)
        states, self._kept = self._states(come.layer, states), list(come.kept)
        amax = {key: torch.tensor(value) for key, value in come.seen.items()}
        self._seen, self._digests = Seen(amax, dict(come.tokens)), list(come.sums)
        self.on_batch(come.layer * len(self.batches))
        self._help_others(come.layer)
        for layer in range(come.layer, self.layers):
            states = self._layer(layer, [of_batch[layer] for of_batch in calls], states)
        if self._heads:
            self._rest(find, states)
        borders = Borders(
            skeleton=self.skeleton,
            find=find,
            calls=calls,
            batches=self.batches,
            states=partial(self._states, like=states),
        )
        return self._seen, borders

    def _has_states(self, come: Come, like: StatesFile) -> bool:
        """Return whether the hidden states that come next, or all that are kept, are intact."""
        if self.keep:
            wanted = dict(enumerate(come.kept)) if len(come.kept) == come.layer + 1 else {}
        else:
            wanted = {come.layer: come.digest}
            if come.layer == self.layers and not self._heads:
                return True
        return bool(wanted) and all(
            self._states(layer, like).is_intact(digest) for layer, digest in wanted.items()
        )

    def _help_others(self, own: int) -> None:
        """Round with ranks that have come less far the layers before ``own``."""
        if self.behind is not None:
            for layer in range(self.behind.first(own), min(own, self._handed_on)):
                self.behind.of(self._names(layer))

    def _names(self, layer: int) -> list[str]:
        assert self.behind is not None
        return list(self.skeleton.names(self.behind.weights, layer))

    def _has_sums(self, come: Come) -> bool:
        """Return whether the sums of the layers before are as they were written."""
        file = self.sums
        if file is None:
            return True
        if not file.path.is_file() or len(come.sums) != come.layer:
            return False
        return all(
            file.is_intact((p.name for p in self._summed(layer)), digest)
            for layer, digest in enumerate(come.sums)
        )

    def _through(
        self, module: nn.Module, calls: Sequence[Call], states: StatesFile
    ) -> Iterator[torch.Tensor]:
        """Yield what a layer makes of each batch's hidden states."""
        for call, hidden in zip(calls, states.read(), strict=True):
            with torch.no_grad():
                yield call.run(module, hidden)

    def _summed(self, layer: int | None) -> list[Param]:
        """Return the parameters of a layer, None for the output layer, that need sums."""
        decisions = self.sums.decisions if self.sums is not None else {}
        return [p for p in self.params if p.layer == layer and p.name in decisions]

    def _states(self, layer: int, like: StatesFile) -> StatesFile:
        return StatesFile(self.place.states(layer), like.shapes, like.dtype)

    def _enter(self, write: bool) -> tuple[Calls, list[list[Call]], StatesFile, str]:
        """Return what finds calls, each batch's, and what enters the first layer.

        That is in a file if ``write``, whose digest is the last one.
        """
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
        return find, calls, file, digest

    def _layer(self, layer: int, calls: Sequence[Call], states: StatesFile) -> StatesFile:
        """Run a layer over all batches; return its hidden states, not written for the last one."""
        self.skeleton.fill_layer(layer)
        held, module = watched(self.skeleton.model, self.params), self.skeleton.layers[layer]
        sums = dict(self._new_sums(layer))
        real = [w for w in held if w.parameter.device.type != "meta"]
        mode = WeightInputSums(real, {keys_of(p)[0]: found for p, found in sums.values()})

        cache = CacheAmax(self.caches[layer], layer) if layer in self.caches else None

        def made() -> Iterator[torch.Tensor]:
            for call, hidden in zip(calls, states.read(), strict=True):
                with torch.no_grad(), mode, forced_experts(module, self.expert_share, mode):
                    out = call.run(module, hidden, cache)
                yield out
                self.on_batch(1)

        later, digest = self._states(layer + 1, states), ""
        last = layer == self._handed_on
        if last or self.behind is not None:
            for _ in made():
                pass
        else:
            digest = later.write(made())
        self._seen.amax.update(self._checked(mode.found.amax))
        self._seen.amax.update(cache.found if cache else {})
        self._seen.tokens.update(mode.found.tokens)
        if self.sums is not None:
            put = self.sums.put({name: found for name, (_, found) in sums.items()})
            self._digests.append(put)
        if self.behind is not None and not last:
            self.skeleton.empty()
            self.skeleton.fill_layer(layer, self.behind.of(self._names(layer)))
            digest = later.write(self._through(module, calls, states))
        self.skeleton.empty()
        give_back()
        if self.keep:
            self._kept.append(digest)
        if not any(call.hands_on for call in calls):  # else what is handed on is nowhere but here
            seen = {key: value.item() for key, value in self._seen.amax.items()}
            come = Come(
                layer=layer + 1,
                digest=digest,
                seen=seen,
                tokens=self._seen.tokens,
                sums=self._digests,
                kept=self._kept,
            )
            self.place.save(come)
        if not self.keep:
            states.path.unlink(missing_ok=True)
        return later

    def _rest(self, find: Calls, states: StatesFile) -> None:
        """Measure what enters the output layer: what the last norm makes of the hidden states."""
        sums = dict(self._new_sums(None))
        mode = WeightInputSums((), {name: found for name, (_, found) in sums.items()})
        self.skeleton.fill_rest()
        with torch.no_grad():
            for ids, hidden in zip(self.batches, states.read(), strict=True):
                x = find.last(ids, hidden)
                for head in self._heads:
                    mode.on_input(head.name, x)
                self.on_batch(1)
        self._seen.amax.update(self._checked(mode.found.amax))
        if self.sums is not None:
            self.sums.put({name: found for name, (_, found) in sums.items()})
        self.skeleton.empty()
        give_back()

    def _new_sums(self, layer: int | None) -> Iterator[tuple[str, tuple[Param, RunningSum]]]:
        """Yield an empty sum for each slot of a layer, or outside of all, that needs one."""
        for param in self._summed(layer):
            assert self.sums is not None
            name = param.name
            summed = RunningSum.of(self.sums.decisions[name], self.input_amax.get(name))
            yield name, (param, summed)

    def _checked(self, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Raise CalibrationError at the first layer whose inputs are not finite."""
        for key, value in seen.items():
            if not isfinite(value.item()):
                name = next((p.name for p in self.params if key in input_keys(p)), key)
                raise CalibrationError(
                    f"input of {name} contains NaN or Inf: repair the checkpoint"
                )
        return seen


def steps(params: Sequence[Param], caches: Iterable[int], layers: int) -> int:
    """Return how many of a model's ``layers`` a walk runs; the output layer is one more."""
    if any(p.role is Role.OUTPUT for p in params):
        return layers + 1
    return 1 + max((*caches, *(p.layer for p in params if p.layer is not None)), default=-1)
