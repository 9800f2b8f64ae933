"""Where the model of a run comes from: Hugging Face files, or a Megatron checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.ckpt.read import Weights, open_source
from megatron_quant.ckpt.storage import read_config
from megatron_quant.dist import Groups, together
from megatron_quant.errors import QuantError
from megatron_quant.mcore.checkpoint import (
    PlainWeights,
    TorchDist,
    is_quantized,
    model_of_run,
    open_plain,
    open_stored,
)
from megatron_quant.runs.job import Job, OpenWeights
from megatron_quant.runs.options import QuantizeOptions

if TYPE_CHECKING:
    from megatron_quant.mcore.checkpoint import Saved


@dataclass(frozen=True)
class Start:
    """The start of a run: ``options`` that name a source, and the model, quantized or not.

    saved: the quantized model of a Megatron checkpoint. open_weights: opens the weights of the
    model whose config.json is in a directory; None if they are ``saved``'s. config: content of
    config.json where no directory has it.
    """

    options: QuantizeOptions
    saved: "Saved | None" = None
    open_weights: OpenWeights | None = open_source
    config: Mapping[str, Any] | None = None

    @property
    def model(self) -> tuple["Saved | None", OpenWeights | None, Mapping[str, Any] | None]:
        """Return what :func:`open_inputs` takes."""
        return self.saved, self.open_weights, self.config


def opened(options: QuantizeOptions, groups: Groups) -> Start:
    """Open ``--megatron-load-path``, if it is given. Collective."""
    if options.megatron_load_path is None:
        return Start(options)
    options, stored, config = _located(options, options.megatron_load_path, groups)
    if not is_quantized(stored):
        return Start(options, None, _opener(stored, config), config)
    from megatron_quant.mcore.checkpoint import read_saved  # imports Megatron

    return Start(options, read_saved(stored, groups), None, config)


@dataclass(frozen=True)
class Unquantized:
    """A model that is not quantized: what opens its weights, and its config if no file has it."""

    open_weights: OpenWeights = open_source
    config: Mapping[str, Any] | None = None


def opened_unquantized(
    options: QuantizeOptions, groups: Groups
) -> tuple[QuantizeOptions, Unquantized]:
    """Return ``options`` that name a source, and the model. Collective.

    Megatron is not needed. Raises QuantError, on every rank, if it is quantized in a Megatron
    checkpoint.
    """
    if options.megatron_load_path is None:
        return options, Unquantized()
    options, stored, config = _located(options, options.megatron_load_path, groups)
    if is_quantized(stored):
        flag = "--auto-quantize-bits" if options.auto.bits is not None else "--stream"
        raise QuantError(
            f"{stored.path} is quantized already, and {flag} is for models that are not: export it "
            "with megatron-quant export --megatron-load-path"
        )
    return options, Unquantized(_opener(stored, config), config)


def _located(
    options: QuantizeOptions, path: Path, groups: Groups
) -> tuple[QuantizeOptions, TorchDist, Mapping[str, Any] | None]:
    stored, config = open_stored(path, groups, options.skip_keys), None
    if options.hf_model_id is None:
        folder, config = together(groups, lambda: model_of_run(stored.path))
        options = replace(options, hf_model_id=str(folder))
    return options, stored, config


def _opener(stored: TorchDist, config: Mapping[str, Any] | None) -> OpenWeights:
    # A search plans every candidate anew, and opening looks into every file.
    return cache(lambda hf: open_plain(stored, config or read_config(hf)))


def original(job: Job) -> Path | Weights | None:
    """Return what an export is compared with: the weights that were quantized, if at hand."""
    if job.checkpoint is None or isinstance(job.checkpoint, PlainWeights):
        return job.checkpoint
    return job.source
