"""Find, follow and freeze the ranges of a model in training.

:class:`QuantCallback` has the events of Megatron-Bridge's callbacks (``on_train_start``,
``on_train_step_start``, ``on_train_step_end``, ``on_train_end``, ``on_checkpoint_save``). For other
loops it has ``start``, ``on_step_begin``, ``on_step_end``, ``on_save`` and ``finish``. All of them
are collective.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_quant.calib import (
    ColdExperts,
    Drift,
    InputRules,
    RunningInputs,
    ScaleLearner,
    calibrate,
    largest_drift,
    merge_live,
    ranges_of,
    refresh_weights,
    set_ranges,
    update_inputs,
)
from megatron_quant.errors import CalibrationError, QuantError
from megatron_quant.mcore.checkpoint import before_save
from megatron_quant.mcore.live import Quantized, quantized


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When ranges are found, followed and frozen. Steps are counted from 0, before any training.

    A model that `prepare` filled from a checkpoint is calibrated and warmed up: it has the
    checkpoint's ranges and runs quantized from its first step on. If the checkpoint is from before
    its inputs had ranges, they are found as in a new run.

    calibrate_before: the first step whose inputs have ranges. The steps before it run unquantized
        and give the ranges. 0 if the model is calibrated already.
    warm_up: how many more steps run unquantized.
    every: how many steps pass until the ranges follow the weights and inputs again; 0 for never.
        Ranges of weights follow at every save too.
    freeze_before: the step from which ranges stay as they are; None for never.
    average: the weight of the newest range of inputs in an exponential average; None for a running
        maximum.
    """

    calibrate_before: int = 1
    warm_up: int = 0
    every: int = 10
    freeze_before: int | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that are no step, interval or share."""
        for name in ("calibrate_before", "warm_up", "every"):
            if getattr(self, name) < 0:
                raise QuantError(f"{name}={getattr(self, name)}: give 0 or more steps")
        if self.freeze_before is not None and self.freeze_before < self.calibrate_before:
            raise QuantError(
                f"freeze_before={self.freeze_before} is before calibrate_before="
                f"{self.calibrate_before}, so there is nothing to freeze: give a later step"
            )
        if self.average is not None and not 0 < self.average <= 1:
            raise QuantError(f"average={self.average}: give a share above 0, up to 1")

    def frozen(self, step: int) -> bool:
        """Return whether the ranges of step ``step`` are frozen."""
        return self.freeze_before is not None and step > self.freeze_before


class QuantCallback:
    """Finds, follows and freezes the ranges of a model that :func:`prepare` gave quantizers."""

    def __init__(
        self,
        schedule: Schedule = Schedule(),
        log: Callable[[str], None] = print,
    ) -> None:
        """Set up; ``log`` gets every message, on rank 0."""
        self.schedule = schedule
        self._log = log
        self._of: Quantized | None = None
        self._inputs: RunningInputs | None = None
        self._calibrated = False
        self._warm = False
        self._fresh = True
        self._updates = 0
        self._step = 0  # steps that are done
        self._first: int | None = None
        self._drift: Drift | None = None

    def on_train_start(self, context: Any) -> None:
        """Handle Megatron-Bridge's event: call :meth:`start`."""
        self.start(context.model)
        self._step = context.state.train_state.step

    def on_train_step_start(self, context: Any) -> None:
        """Handle Megatron-Bridge's event: call :meth:`on_step_begin`."""
        self.on_step_begin(context.state.train_state.step)

    def on_train_step_end(self, context: Any) -> None:
        """Handle Megatron-Bridge's event, whether it counts the step before or after it."""
        self.on_step_end(self._step)

    def on_train_end(self, context: Any) -> None:
        """Handle Megatron-Bridge's event: call :meth:`finish`."""
        self.finish(context.state.train_state.step)

    def on_checkpoint_save(self, context: Any) -> None:
        """Handle Megatron-Bridge's event: call :meth:`on_save`."""
        self.on_save(context.state.train_state.step)

    def start(self, model: Any) -> None:
        """Start to follow the model, wrapped or not. Call it before the first step."""
        self._of = of = quantized(model)
        # Float16Module casts every buffer to 16 bits.
        set_ranges(of.layers, of.stored or ranges_of(of.layers))
        self._fresh = not of.stored
        self._inputs = RunningInputs(of.layers)
        inputs = [x.input_quantizer.amax for x in of.layers if x.static_inputs]
        self._calibrated = all(amax is not None for amax in inputs)
        self._warm = self._calibrated and bool(of.stored)
        before_save(of.model, self._follow_weights)

    def calibrate(
        self,
        forwards: Iterable[Callable[[], object]],
        cold_experts: ColdExperts = ColdExperts.LAYER_MAX,
    ) -> None:
        """Find the ranges of inputs from the caller's batches; each of ``forwards`` runs one."""
        of = self._started()
        calibrate(
            of.layers, of.plan, of.model.groups, forwards, InputRules(cold_experts=cold_experts)
        )
        self._calibrated = True

    def on_step_begin(self, step: int) -> None:
        """Prepare the quantizers for step ``step``. Call it before the step's forwards."""
        of, self._step = self._started(), step
        if self._first is None:
            self._first = step
        if self._fresh:  # weights may have been loaded meanwhile
            self._follow_weights()
        self._fresh = False
        if not self._calibrated and step >= self._calibrate_at(self._first):
            self._calibrate(step)
        quantized_from = self.schedule.calibrate_before + self.schedule.warm_up
        on = self._calibrated and (self._warm or step >= quantized_from)
        for layer in of.layers:
            quantizers = layer.quantizers if layer.decisions[0].inputs else layer.quantizers[:1]
            for quantizer in quantizers:
                quantizer.enable() if on else quantizer.disable()

    def on_step_end(self, step: int) -> None:
        """Follow the ranges if they are due. Call it after the optimizer's step."""
        self._step = step + 1
        every = self.schedule.every
        if self._calibrated and every and (step + 1) % every == 0:
            self._follow(step + 1)

    def on_save(self, step: int) -> None:
        """Refresh the weights' ranges and log a line. Call it before a save after ``step`` steps.

        Weights get their present range, whatever ``every`` is, unless it is frozen.
        """
        of, self._step = self._started(), step
        self._follow_weights()
        formats = Counter(str(d.weights.name) for d in of.plan.quantized if d.weights)
        held = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
        if not self._calibrated:
            ranges = f"not calibrated before step {self.schedule.calibrate_before}"
        else:
            ranges = "frozen" if self.schedule.frozen(step + 1) else "followed"
            ranges += f" ({self._updates} updates)"
        self._say(f"step {step}: {held} weights, ranges {ranges}, {self._largest()}")

    def finish(self, step: int) -> None:
        """Set the ranges of the final weights. Call it after the last of ``step`` steps."""
        if self._calibrated:
            self._follow(step)
        if self._inputs is not None:
            self._inputs.close()

    def _follow_weights(self) -> None:
        """Give the weights the ranges that they have now, unless those are frozen."""
        of = self._started()
        if not self.schedule.frozen(self._step):
            refresh_weights(of.layers, of.plan, of.model.groups)

    def _started(self) -> Quantized:
        if self._of is None:
            raise QuantError(
                "the callback has no model: call start(model) before the first step (Megatron-"
                "Bridge calls it as on_train_start)"
            )
        return self._of

    def _calibrate_at(self, first: int) -> int:
        """Return the step before which inputs get ranges; a run that goes on observes one first."""
        before = self.schedule.calibrate_before
        return max(before, first + 1) if before else 0

    def _calibrate(self, step: int) -> None:
        of, watched = self._started(), self._inputs
        assert watched is not None
        live = merge_live(of.layers, of.plan, of.model.groups, watched.take())
        for decision in of.plan.quantized:
            name, inputs = decision.slot.module, decision.inputs
            if inputs is not None and inputs.tensor_scale and name not in live.inputs:
                raise CalibrationError(
                    f"no token reached {name} before step {step}: raise calibrate_before (it is "
                    f"{self.schedule.calibrate_before}), or give batches to QuantCallback.calibrate"
                )
        update_inputs(of.layers, live.inputs, self.schedule.average)
        refresh_weights(of.layers, of.plan, of.model.groups)
        self._calibrated = True
        self._say(f"step {step}: calibrated {len(of.plan.quantized)} weights")

    def _follow(self, step: int) -> None:
        """Note the drift since the last refresh and, unless they are frozen, refresh the ranges."""
        of, watched = self._started(), self._inputs
        assert watched is not None
        live = merge_live(of.layers, of.plan, of.model.groups, watched.take())
        self._drift = largest_drift(of.layers, live, of.model.groups)
        self._say(f"step {step}: {self._largest()}")
        if not self.schedule.frozen(step):
            update_inputs(of.layers, live.inputs, self.schedule.average)
            refresh_weights(of.layers, of.plan, of.model.groups)
            self._updates += 1

    def _largest(self) -> str:
        if self._drift is None:
            return "no drift measured"
        return f"largest drift {self._drift.ratio:.4f} ({self._drift.name})"

    def _say(self, line: str) -> None:
        if self._started().model.groups.rank == 0:
            self._log(f"quantizers: {line}")


def learn_scales(model: Any, lr: float = 1e-3) -> ScaleLearner:
    """Return what learns the block scales of a model in training; see :class:`ScaleLearner`.

    model: the model or its handle, wrapped or not, after :meth:`QuantCallback.start`. lr: the
    largest relative step. Raises QuantError where no scale of it stays (only gptq's do).
    """
    of = quantized(model)
    return ScaleLearner(of.layers, of.model.groups, lr)
