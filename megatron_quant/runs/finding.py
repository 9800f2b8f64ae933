"""The front door of the search: a recipe, without an export, and another one of kept scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.documents import check_output_file
from megatron_quant.errors import QuantError
from megatron_quant.runs.found import Found, chosen
from megatron_quant.runs.options import QuantizeOptions
from megatron_quant.runs.phases import Phases, Quiet
from megatron_quant.runs.settings import AutoQuantize, Calibration, Parallel, Serve

if TYPE_CHECKING:
    from torch import nn

    from megatron_quant.dist import Groups
    from megatron_quant.search import Loss, Problem


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


def search_again(
    directory: str | Path,
    bits: float,
    *,
    formats: str | None = None,
    cost: str = "weight",
    recipe: str | Path | None = None,
    report: str | Path | None = None,
    log_to: str | None = None,
) -> Found:
    """Choose again among scored formats, without a forward.

    Args:
        directory: the ``checkpoint`` of a finished search.
        bits: most bits a weight.
        formats: some of its candidates, with commas between; None for all.
        cost: ``weight`` or ``active``, as in :class:`AutoQuantize`.
        recipe: file for the found recipe; None writes none.
        report: file for the scores and the choice: a page (.html), with the same as .json beside
            it; with another ending JSON alone.
        log_to: tracker that gets them: ``mlflow``, ``mlflow:URI``, ``tensorboard:DIR``.

    Raises:
        QuantError: for a directory without finished scores, and bits that cannot be met.
    """
    from megatron_quant.dist import Groups
    from megatron_quant.runs.facts import of_found
    from megatron_quant.runs.report import check_report, reporting, write_report
    from megatron_quant.search import NONE, Scored, ScoreStore, write_recipe

    where = reporting(report, log_to)
    check_report(where, Groups(), directory)
    file = None if recipe is None else Path(recipe)
    check_output_file("--recipe", file)
    store = ScoreStore(Path(directory))
    scored = store.read()
    problem, scores = scored.problem, scored.scores
    if formats is not None:
        wanted = {name.strip() for name in formats.split(",")}
        kept = problem.restricted(sorted(wanted - {"", NONE}))
        scores = _of_options(problem, kept, scores)
        problem = kept
    found = chosen(Scored(problem, scores, scored.method), bits, cost, "--bits")
    if file is not None:
        write_recipe(file, found.recipe)
    write_report(where, Groups(), lambda: of_found(found, str(directory)))
    return found


def _of_options(
    problem: "Problem", kept: "Problem", scores: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Return the scores of the options that are left."""
    found = {}
    for place, fewer in zip(problem.places, kept.places, strict=True):
        by_option = zip(place.options, scores[place.name], strict=True)
        found[place.name] = [score for option, score in by_option if option in fewer.options]
    return found
