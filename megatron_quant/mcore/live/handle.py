"""The handle of a live model that has quantizers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from megatron_quant.calib import CalibrationReport, Ranges
from megatron_quant.ckpt.storage import read_config, resolve_source
from megatron_quant.errors import QuantError
from megatron_quant.folding import Fold
from megatron_quant.layers import CachedTensor, ExpertScales, QuantLayer
from megatron_quant.mcore.model import LiveModel
from megatron_quant.recipes import QuantPlan, Recipe

_ATTRIBUTE = "_megatron_quant"
"""The attribute that keeps a chunk's handle; set in ``vars``, so that no state dict has it."""


@dataclass(frozen=True)
class HFModel:
    """The Hugging Face side of a model: config.json, and the directory that has it.

    directory: None if only the config was given.
    """

    config: Mapping[str, Any]
    directory: Path | None = None

    @property
    def weights(self) -> Path | None:
        """Return the directory if it has safetensors; None if it has none."""
        found = self.directory is not None and any(self.directory.glob("*.safetensors"))
        return self.directory if found else None


def read_hf_model(hf_model: str | Path | Mapping[str, Any]) -> HFModel:
    """Read ``hf_model``: a directory, a hub id, or the content of config.json.

    Raises CheckpointError if there is no config.json to read.
    """
    if isinstance(hf_model, Mapping):
        return HFModel(hf_model)
    directory = resolve_source(str(hf_model))
    return HFModel(read_config(directory), directory)


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantized:
    """A live model with quantizers.

    model: this rank's part, with the meaning of its parameters. plan: the recipe's decision on
    every weight. layers, cached: this rank's quantized linears and KV caches. stored: ranges from
    a Megatron checkpoint; empty if calibration finds them. source: digest of the Hugging Face
    checkpoint, for the manifest; empty if it is not known. report, kv_amax: calibration's
    findings; None and empty before it. fold: the factors that it folded into the whole model's
    weights.
    """

    model: LiveModel
    hf: HFModel
    recipe: Recipe
    plan: QuantPlan
    expert_scales: ExpertScales
    layers: tuple[QuantLayer, ...]
    cached: tuple[CachedTensor, ...] = ()
    stored: Ranges = ()
    source: str = ""
    report: CalibrationReport | None = None
    kv_amax: Mapping[str, float] = field(default_factory=dict)
    fold: Fold = field(default_factory=Fold)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Give a copied model no handle, because its tensors are different ones."""

    def remember(self) -> "Quantized":
        """Make this the handle that :func:`quantized` finds on the model; return it."""
        for chunk in self.model.chunks:
            vars(chunk)[_ATTRIBUTE] = self
        return self

    def enable(self) -> None:
        """Quantize in every forward from now on; the calibrated ranges are used."""
        for quantizer in self._quantizers():
            quantizer.enable()

    def disable(self) -> None:
        """Run every forward unquantized from now on; the calibrated ranges stay."""
        for quantizer in self._quantizers():
            quantizer.disable()

    def _quantizers(self) -> list[Any]:
        quantizers: list[Any] = []
        for layer in self.layers:
            quantizers += layer.quantizers if layer.decisions[0].inputs else layer.quantizers[:1]
        return [*quantizers, *(q for tensor in self.cached for q in tensor.quantizers)]

    def summary(self) -> str:
        """Return a few lines: what is quantized, in which formats, and what calibration saw."""
        decided = self.plan.decisions
        formats = Counter(d.weights.name if d.weights else "unquantized" for d in decided)
        lines = [f"recipe {self.recipe.name}: {len(decided)} weights"]
        lines += [f"  {count:>6} {name}" for name, count in formats.most_common()]
        if self.plan.kv_cache:
            lines.append(f"  KV cache: {self.plan.kv_cache}")
        if self.report is None:
            return "\n".join([*lines, self._ranges()])
        if tokens := sorted(self.report.tokens.values()):
            median = tokens[len(tokens) // 2]
            lines.append(f"tokens an expert saw: {tokens[0]} to {tokens[-1]}, median {median}")
        if self.report.cold:
            lines.append(f"cold experts' weights: {len(self.report.cold)}")
        return "\n".join(lines)

    def _ranges(self) -> str:
        """Say where the ranges come from, if no calibration of this process reports them."""
        if self.stored:
            return "ranges came from a Megatron checkpoint"
        if all(layer.weight_quantizer.amax is None for layer in self.layers):
            return "not calibrated"
        inputs = [layer for layer in self.layers if layer.static_inputs]
        found = sum(layer.input_quantizer.amax is not None for layer in inputs)
        return f"weights calibrated; {found} of {len(inputs)} static input scales found"


def quantized(model: nn.Module | Sequence[nn.Module] | Quantized) -> Quantized:
    """Return the handle of a model that was given quantizers, whatever wraps it now.

    model: the model, the list of its chunks, or an older handle, for which the newest one is
    returned. Raises QuantError if it has no quantizers.
    """
    if isinstance(model, Quantized):
        return _handle_of(model.model.chunks) or model
    found = _handle_of(model)
    if found is None:
        name = type(model[0] if isinstance(model, Sequence) else model).__name__
        raise QuantError(
            f"{name} has no quantizers: pass it to megatron_quant.quantize, or, before it is "
            "wrapped, to the hook megatron_quant.mcore.training.prepare"
        )
    return found


def is_quantized_model(model: nn.Module | Sequence[nn.Module]) -> bool:
    """Return whether the model was given quantizers, whatever wraps it now."""
    return _handle_of(model) is not None


def check_unquantized(model: nn.Module | Sequence[nn.Module]) -> None:
    """Raise QuantError if the model has quantizers already."""
    found = _handle_of(model)
    if found is not None:
        raise QuantError(
            f"the model has quantizers already, of recipe {found.recipe.name!r}: take their handle "
            "from megatron_quant.quantized(model), or load the weights into a new model for "
            "another recipe"
        )


def _handle_of(model: nn.Module | Sequence[nn.Module]) -> Quantized | None:
    """Find the handle on a model or the first of its chunks, behind whatever wraps it."""
    chunk: Any = model[0] if isinstance(model, Sequence) else model
    while chunk is not None:
        found = vars(chunk).get(_ATTRIBUTE)
        if isinstance(found, Quantized):
            return found
        chunk = getattr(chunk, "module", None)
    return None
