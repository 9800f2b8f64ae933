"""The front door of the search: a recipe for a checkpoint or a live model, without an export."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.errors import QuantError
from megatron_quant.runs.found import Found
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases, Quiet
from megatron_quant.runs.settings import AutoQuantize, Calibration, Parallel, Serve

if TYPE_CHECKING:
    from torch import nn

    from megatron_quant.dist import Groups
    from megatron_quant.search import Loss


def find_recipe(
    model: "str | Path | nn.Module | Sequence[nn.Module]",
    auto: AutoQuantize,
    *,
    hf_model: str | Path | Mapping[str, Any] | None = None,
    parallel: Parallel | None = None,
    calibration: Calibration = Calibration(),
    loss: "Loss | None" = None,
    expert_scales: str = "shared",
    dtype: str = "bf16",
    format: str = "modelopt",
    serve: Serve = Serve(),
    groups: "Groups | None" = None,
    phases: Phases | None = None,
) -> Found:
    """Search for the format of every place: the least loss within a number of bits. Collective.

    Args:
        model: a live Megatron model (this rank's GPTModel, or the list of its pipeline chunks,
            wrapped or not), which is left as it was; or a checkpoint's directory or hub id.
        auto: the bits that are allowed, the candidates, and where scores and recipe are kept.
        hf_model: of a live model, its Hugging Face directory, hub id or config.
        parallel: of a checkpoint, the layout at which Megatron runs it; None runs transformers'
            model.
        calibration: the text, and how static scales of inputs follow from it.
        loss: the loss whose gradients score: a function of logits, fp32 [B, S, V], and token ids,
            int64 [B, S], that returns the sum of the losses of all tokens. None for that of the
            next token.
        expert_scales: ``shared`` or ``per_expert``, as in :func:`quantize`.
        dtype: of a checkpoint, the dtype in which it is run.
        format: the dialect of the export, by which bits are counted.
        serve: the engine that will serve it; what it cannot mix is refused.
        groups: the ranks that hold the model or share the samples; None for all.
        phases: where progress is shown; None shows nothing.

    Returns:
        The recipe, and what it was chosen among.

    Raises:
        QuantError: on every rank alike, before anything is scored, for whatever does not fit; for
            a loss that is not finite.
    """
    if auto.bits is None:
        raise QuantError("AutoQuantize has no bits: say how many a weight may take, such as 5.0")
    if loss is not None and auto.method != "gradient":
        raise QuantError(f"loss= is for method gradient, not {auto.method}: leave one of them out")
    shown = phases or Quiet()
    if isinstance(model, str | Path):
        options = QuantizeOptions(
            hf_model_id=str(model),
            export_quant_cfg=None,
            export_format=format,
            dtype=dtype,
            parallel=parallel or Parallel(),
            calibration=calibration,
            serve=serve,
            auto=auto,
            expert_scales=expert_scales,
            stream=parallel is None,
        )
        return _of_checkpoint(options, loss, groups, shown)
    if hf_model is None:
        raise QuantError("a live model needs hf_model: its Hugging Face directory, id or config")
    from megatron_quant.runs.live_search import LiveTarget, search_live

    target = LiveTarget(
        hf_model=hf_model,
        calibration=calibration,
        expert_scales=expert_scales,
        format=format,
        serve=serve,
    )
    return search_live(model, auto, target, loss, groups, shown)


def _of_checkpoint(
    options: QuantizeOptions, loss: "Loss | None", groups: "Groups | None", phases: Phases
) -> Found:
    from megatron_quant.runs.auto_quantize import found_recipe

    if options.stream:
        from megatron_quant.rendezvous import start_ranks

        return found_recipe(options, groups or start_ranks(), phases, loss)
    from megatron_quant.cpu import use_cpu

    use_cpu()
    from megatron_quant.mcore.model import start_distributed

    return found_recipe(options, groups or start_distributed(), phases, loss)
