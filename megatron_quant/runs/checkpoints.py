"""The front door for checkpoints: quantize, stream, convert, plan, verify, evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.ckpt.verify import Report
from megatron_quant.ckpt.verify import verify as verify_checkpoint
from megatron_quant.dist import Groups
from megatron_quant.errors import QuantError
from megatron_quant.evaluation import Result, Text, TokenizerChoice
from megatron_quant.evaluation import evaluate as evaluate_checkpoint
from megatron_quant.recipes import Recipe
from megatron_quant.rendezvous import start_ranks
from megatron_quant.runs.conversion import ExportOptions, Rewritten, reexport
from megatron_quant.runs.file_to_file import Streamed, plan_stream, stream_files
from megatron_quant.runs.job import Job, planned
from megatron_quant.runs.options import QuantizeOptions, dtype_of
from megatron_quant.runs.phases import Phases, Quiet
from megatron_quant.runs.settings import Calibration, Parallel, Serve, Write

if TYPE_CHECKING:  # imports Megatron, which needs use_cpu() first on a host without a GPU
    from megatron_quant.runs.megatron import Outcome


def quantize_checkpoint(
    source: str | Path,
    recipe: str | Recipe,
    out: str | Path,
    *,
    parallel: Parallel = Parallel(),
    calibration: Calibration = Calibration(),
    format: str = "modelopt",
    serve: Serve = Serve(),
    write: Write = Write(),
    phases: Phases | None = None,
    **flags: Any,
) -> "Outcome":
    """Quantize a Hugging Face checkpoint through Megatron. Collective over torchrun's ranks.

    Args:
        source: the checkpoint's directory or hub id (safetensors).
        recipe: as ``--export-quant-cfg`` takes it, or a Recipe.
        out: the directory to write.
        parallel: the layout; it must fit the number of ranks. The bytes do not depend on it.
        phases: where progress is shown; None shows nothing.
        flags: further flags of ``megatron-quant quantize`` by name, such as ``keep_scales=True``.

    Returns:
        The findings: ranges, tokens that each expert saw, the verification.

    Raises:
        QuantError: on every rank alike; no export that looks complete is left.
    """
    from megatron_quant.mcore.model import start_distributed
    from megatron_quant.runs.megatron import quantize_run

    options = _options(
        source,
        recipe,
        flags,
        export_dir=Path(out),
        export_format=format,
        parallel=parallel,
        calibration=calibration,
        serve=serve,
        write=write,
    )
    return quantize_run(options, start_distributed(), phases or Quiet())


def stream(
    source: str | Path,
    recipe: str | Recipe,
    out: str | Path,
    *,
    calibration: Calibration = Calibration(),
    format: str = "modelopt",
    serve: Serve = Serve(),
    write: Write = Write(),
    groups: Groups | None = None,
    phases: Phases | None = None,
    **flags: Any,
) -> Streamed:
    """Quantize a Hugging Face checkpoint file to file, without a Megatron model. Collective.

    Memory does not grow with the model; the ranks share the tensors. Other arguments, and errors,
    are those of :func:`quantize_checkpoint`.
    groups: the ranks that share the work; None for all that torchrun started.
    """
    options = _options(
        source,
        recipe,
        flags,
        export_dir=Path(out),
        export_format=format,
        calibration=calibration,
        serve=serve,
        write=write,
        stream=True,
    )
    return stream_files(options, groups or start_ranks(), phases or Quiet())


def plan(
    source: str | Path,
    recipe: str | Recipe,
    *,
    parallel: Parallel = Parallel(),
    format: str = "modelopt",
    serve: Serve = Serve(),
    write: Write = Write(),
    **flags: Any,
) -> Job:
    """Plan what would happen to every weight, from config.json alone. Writes nothing.

    ``stream=True`` plans :func:`stream`; it also reads the headers of the weights. Raises a
    QuantError for whatever does not fit.
    """
    options = _options(
        source, recipe, flags, export_format=format, parallel=parallel, serve=serve, write=write
    )
    return plan_stream(options, 1).job if options.stream else planned(options)


def _options(
    source: str | Path, recipe: str | Recipe, flags: dict[str, Any], **given: Any
) -> QuantizeOptions:
    unknown = sorted(set(flags) - set(QuantizeOptions.__dataclass_fields__))
    if unknown:
        raise QuantError(
            f"{unknown[0]} is no flag of quantize: give one of "
            f"{', '.join(sorted(QuantizeOptions.__dataclass_fields__))}"
        )
    return QuantizeOptions(**(flags | given), hf_model_id=str(source), export_quant_cfg=recipe)


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: str,
    serve: Serve = Serve(),
    write: Write = Write(),
    groups: Groups | None = None,
    phases: Phases | None = None,
) -> Rewritten:
    """Write a quantized checkpoint in another engine's format, code for code. Collective.

    Raises QuantError, on every rank alike, if ``format`` cannot store what the checkpoint holds.
    """
    options = ExportOptions(
        source=Path(checkpoint),
        export_dir=Path(out),
        export_format=format,
        serve=serve,
        write=write,
    )
    return reexport(options, groups or start_ranks(), phases or Quiet())


def verify(out: str | Path, *, against: str | Path | None = None) -> Report:
    """Check that a checkpoint is complete and matches its own config.

    against: the checkpoint that it was made from. Unquantized tensors must then be equal, and
    quantized ones within a step of their format. Raises VerifyError for the first problem.
    """
    report = verify_checkpoint(Path(out), Path(against) if against is not None else None)
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
) -> Result:
    """Measure perplexity on a text, and the mean KL divergence from ``against`` if it is given.

    text: a UTF-8 file. seq_length: tokens per window; windows do not overlap. tokenizer: the
    tokenizer's folder; None for the checkpoint's own. trust_remote_code: run the code that a
    tokenizer brings along. Raises QuantError for a text or a checkpoint that cannot be used.
    """
    return evaluate_checkpoint(
        Path(out),
        Text(Path(text), seq_length, max_tokens, TokenizerChoice(tokenizer, trust_remote_code)),
        Path(against) if against is not None else None,
        dtype_of(dtype),
    )
