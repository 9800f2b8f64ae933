"""The front door for checkpoints: quantize, stream, convert, plan, verify, evaluate.

What is wrong with arguments is said before torch is imported: so functions import what computes.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.errors import ExportError, QuantError
from megatron_quant.recipes import Recipe, is_preset
from megatron_quant.runs.options import (
    QuantizeOptions,
    check_not_searched,
    check_plannable,
    check_unreported,
    chosen_recipe,
    dtype_of,
)
from megatron_quant.runs.phases import Phases, Quiet, Timed
from megatron_quant.runs.settings import AutoQuantize, Calibration, Parallel, Serve, Write

if TYPE_CHECKING:
    import torch

    from megatron_quant.ckpt.verify import Report
    from megatron_quant.dist import Groups
    from megatron_quant.evaluation import Result
    from megatron_quant.runs.conversion import Rewritten
    from megatron_quant.runs.file_to_file import Streamed
    from megatron_quant.runs.job import Job
    from megatron_quant.runs.megatron import Outcome
    from megatron_quant.runs.search_dry_run import PlannedSearch

_DIGEST_THREADS = 4


def quantize_checkpoint(
    source: str | Path | None,
    recipe: str | Recipe | None,
    out: str | Path | None,
    *,
    parallel: Parallel = Parallel(),
    calibration: Calibration = Calibration(),
    format: str = "modelopt",
    serve: Serve = Serve(),
    write: Write = Write(),
    auto: AutoQuantize = AutoQuantize(),
    phases: Phases | None = None,
    **flags: Any,
) -> "Outcome":
    """Quantize a Hugging Face checkpoint through Megatron. Collective over torchrun's ranks.

    Args:
        source: the checkpoint's directory or hub id (safetensors). None with
            ``megatron_load_path=``, whose own config.json and recipe are taken.
        recipe: as ``--export-quant-cfg`` takes it, or a Recipe; None as ``source``.
        out: the directory to write; None with ``megatron_save_path=``, to save alone.
        parallel: the layout; it must fit the number of ranks. The bytes do not depend on it.
        auto: a search for the recipe, in place of ``recipe``, which is None then.
        phases: where progress is shown; None shows nothing.
        flags: further flags of ``megatron-quant quantize`` by name, such as ``keep_scales=True``.

    A host without a GPU is readied as by ``use_cpu()``.

    Returns:
        The findings: ranges, tokens that each expert saw, the verification.

    Raises:
        QuantError: on every rank alike; no export that looks complete is left.
    """
    options = _options(
        source,
        recipe,
        flags,
        export_dir=out,
        export_format=format,
        parallel=parallel,
        calibration=calibration,
        serve=serve,
        write=write,
        auto=auto,
    )
    _check_place(options)
    from megatron_quant.cpu import use_cpu

    use_cpu()
    from megatron_quant.mcore.model import start_distributed
    from megatron_quant.runs.facts import of_outcome
    from megatron_quant.runs.megatron import quantize_run
    from megatron_quant.runs.report import check_report, reporting, write_report

    groups, timed = start_distributed(options.distributed_timeout_minutes), Timed(phases or Quiet())
    places = (options.hf_model_id, options.export_dir)
    megatron = (options.megatron_save_path, options.megatron_load_path)
    where = reporting(options.report, options.log_to)
    check_report(where, groups, *places, *megatron, options.auto.checkpoint)
    model = options.hf_model_id or str(options.megatron_load_path)
    found = None
    if options.auto.bits is not None:
        from megatron_quant.runs.auto_quantize import with_found_recipe

        options, found = with_found_recipe(options, groups, timed)
    outcome = quantize_run(options, groups, timed)
    outcome = replace(outcome, seconds=timed.seconds, found=found)
    write_report(where, groups, lambda: of_outcome(outcome, model))
    return outcome


def stream(
    source: str | Path | None,
    recipe: str | Recipe | None,
    out: str | Path | None,
    *,
    calibration: Calibration = Calibration(),
    format: str = "modelopt",
    serve: Serve = Serve(),
    write: Write = Write(),
    auto: AutoQuantize = AutoQuantize(),
    groups: "Groups | None" = None,
    phases: Phases | None = None,
    **flags: Any,
) -> "Streamed":
    """Quantize a Hugging Face checkpoint file to file, without a Megatron model. Collective.

    Memory does not grow with the model; the ranks share the tensors. Other arguments, and errors,
    are those of :func:`quantize_checkpoint`.
    auto: a search for the recipe, in place of ``recipe``, which is None then.
    groups: the ranks that share the work; None for all that torchrun started.
    """
    options = _options(
        source,
        recipe,
        flags,
        export_dir=out,
        export_format=format,
        calibration=calibration,
        serve=serve,
        write=write,
        auto=auto,
        stream=True,
    )
    _check_place(options)
    from megatron_quant.rendezvous import start_ranks
    from megatron_quant.runs.facts import of_streamed
    from megatron_quant.runs.file_to_file import stream_files
    from megatron_quant.runs.report import check_report, reporting, write_report

    groups = groups or start_ranks(options.distributed_timeout_minutes)
    timed = Timed(phases or Quiet())
    places = (options.hf_model_id, options.export_dir, options.auto.checkpoint)
    where = reporting(options.report, options.log_to)
    check_report(where, groups, *places, options.megatron_load_path)
    found = None
    if options.auto.bits is not None:
        from megatron_quant.runs.auto_quantize import with_found_recipe

        options, found = with_found_recipe(options, groups, timed)
    streamed = stream_files(options, groups, timed)
    streamed = replace(streamed, seconds=timed.seconds, found=found)
    model = options.hf_model_id or str(options.megatron_load_path)
    write_report(where, groups, lambda: of_streamed(streamed, model))
    return streamed


def plan(
    source: str | Path | None,
    recipe: str | Recipe | None,
    *,
    parallel: Parallel = Parallel(),
    format: str = "modelopt",
    serve: Serve = Serve(),
    write: Write = Write(),
    **flags: Any,
) -> "Job":
    """Plan what would happen to every weight, from config.json alone. Writes nothing.

    ``stream=True`` plans :func:`stream`; it also reads the headers of the weights. Raises a
    QuantError for whatever does not fit.
    """
    options = _options(
        source, recipe, flags, export_format=format, parallel=parallel, serve=serve, write=write
    )
    check_not_searched(options)
    check_unreported(options)
    check_plannable(options)
    if options.stream:
        from megatron_quant.runs.file_to_file import plan_stream

        return plan_stream(options, 1).job
    if isinstance(recipe, str) and is_preset(recipe):
        from megatron_quant.cpu import use_cpu

        use_cpu()  # before ModelOpt is imported
    chosen_recipe(options, None)
    from megatron_quant.runs.job import planned

    return planned(options)


def plan_search(
    source: str | Path | None,
    auto: AutoQuantize,
    *,
    parallel: Parallel = Parallel(),
    calibration: Calibration = Calibration(),
    format: str = "modelopt",
    serve: Serve = Serve(),
    write: Write = Write(),
    **flags: Any,
) -> "PlannedSearch":
    """Plan a search of :func:`stream`: its places, and what scoring them takes. Scores nothing.

    It reads config.json and the headers of the weights. Raises a QuantError for whatever does not
    fit.
    """
    options = _options(
        source,
        None,
        {"stream": True} | flags,
        export_format=format,
        parallel=parallel,
        calibration=calibration,
        serve=serve,
        write=write,
        auto=auto,
    )
    from megatron_quant.runs.search_dry_run import planned_search

    return planned_search(options)


def _options(
    source: str | Path | None, recipe: str | Recipe | None, flags: dict[str, Any], **given: Any
) -> QuantizeOptions:
    unknown = sorted(set(flags) - set(QuantizeOptions.__dataclass_fields__))
    if unknown:
        raise QuantError(
            f"{unknown[0]} is no flag of quantize: give one of "
            f"{', '.join(sorted(QuantizeOptions.__dataclass_fields__))}"
        )
    if given.get("export_dir") is not None:
        given["export_dir"] = Path(given["export_dir"])
    name = None if source is None else str(source)
    return QuantizeOptions(**(flags | given), hf_model_id=name, export_quant_cfg=recipe)


def _check_place(options: QuantizeOptions) -> None:
    if options.export_dir is None and options.megatron_save_path is None:
        raise ExportError(
            "--export-dir is missing: say where the checkpoint goes, or give --megatron-save-path "
            "or --dry-run"
        )


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str,
    serve: Serve = Serve(),
    write: Write = Write(),
    groups: "Groups | None" = None,
    phases: Phases | None = None,
) -> "Rewritten":
    """Write a quantized checkpoint in another engine's format, code for code. Collective.

    Raises QuantError, on every rank alike, if ``format`` cannot store what the checkpoint holds.
    """
    from megatron_quant.rendezvous import start_ranks
    from megatron_quant.runs.conversion import ExportOptions, reexport

    options = ExportOptions(
        source=Path(checkpoint),
        export_dir=Path(out),
        export_format=format,
        serve=serve,
        write=write,
    )
    return reexport(options, groups or start_ranks(), phases or Quiet())


def verify(
    out: str | Path,
    *,
    against: str | Path | None = None,
    digests: bool = False,
    strict: bool = True,
    groups: "Groups | None" = None,
) -> "Report":
    """Check that a checkpoint is complete and matches its own config.

    against: the checkpoint that it was made from. Unquantized tensors must then be equal, and
    quantized ones within a step of their format. digests: also compare all bytes with the digests
    that the export wrote. groups: ranks that share the work, all of which call it; each gets the
    whole report. None: this process does all. Raises VerifyError for the first problem;
    strict=False leaves that to ``raise_for_problems()`` of the report.
    """
    from megatron_quant.ckpt.verify import verify as verify_checkpoint
    from megatron_quant.ckpt.write import digest_problems

    directory, source = Path(out), Path(against) if against is not None else None

    def damaged() -> tuple[str, ...]:
        return tuple(digest_problems(directory, _DIGEST_THREADS))

    if groups is None:
        report = verify_checkpoint(directory, source)
        found = damaged() if digests else ()
    else:
        from megatron_quant.alike import once_a_host
        from megatron_quant.runs.destination import verify_together

        report = verify_together(directory, source, groups)
        found = once_a_host(groups, damaged) if digests else ()
    report = replace(report, problems=(*found, *report.problems))
    if strict:
        report.raise_for_problems()
    return report


def evaluate(
    out: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    seq_length: int = 512,
    max_tokens: int | None = None,
    dtype: str = "bf16",
    tokenizer: str | Path | None = None,
    trust_remote_code: bool = False,
    native: bool = False,
    report: str | Path | None = None,
    log_to: str | None = None,
    progress: "Callable[[list[torch.Tensor]], Iterable[torch.Tensor]] | None" = None,
) -> "Result":
    """Measure perplexity on a text, and the mean KL divergence from ``against`` if it is given.

    Args:
        text: a UTF-8 file.
        seq_length: tokens per window; windows do not overlap.
        max_tokens: tokens in all; None for the whole text.
        tokenizer: the tokenizer's folder; None for the checkpoint's own.
        trust_remote_code: run the code that a tokenizer brings along.
        native: let transformers read the quantized format itself.
        report: file for the figures, also by position and by class of token: a page (.html), with
            the same as .json beside it; with another ending JSON alone.
        log_to: tracker that gets them: ``mlflow``, ``mlflow:URI``, ``tensorboard:DIR``.
        progress: wraps the list of windows, to show progress; None shows nothing.

    Raises:
        QuantError: for a text or a checkpoint that cannot be used.
    """
    for flag, value in (("--seq-length", seq_length), ("--max-tokens", max_tokens)):
        if value is not None and value < 1:
            raise QuantError(f"{flag} is {value}: give at least 1")
    from megatron_quant import evaluation
    from megatron_quant.dist import Groups
    from megatron_quant.runs.facts import of_result
    from megatron_quant.runs.report import check_report, reporting, write_report
    from megatron_quant.streaming import quiet

    choice = evaluation.TokenizerChoice(tokenizer, trust_remote_code)
    directory, reference = Path(out), Path(against) if against is not None else None
    where = reporting(report, log_to)
    check_report(where, Groups(), directory, reference)
    with quiet() if progress is None else nullcontext():
        result = evaluation.evaluate(
            directory,
            evaluation.Text(Path(text), seq_length, max_tokens, choice),
            reference,
            dtype_of(dtype),
            evaluation.native if native else evaluation.decoded,
            progress or iter,
        )
    write_report(where, Groups(), lambda: of_result(result, str(out), Path(text), reference))
    return result
