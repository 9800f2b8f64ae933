"""Rewriting a quantized checkpoint in another dialect, without a model."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_quant.api.options import parse_size
from megatron_quant.api.phases import Phases
from megatron_quant.api.target import check_not_source, existing_of
from megatron_quant.ckpt.companions import companions
from megatron_quant.ckpt.dialects import get_dialect
from megatron_quant.ckpt.layout import Layout
from megatron_quant.ckpt.origin import Origin, digest_of, source_digest
from megatron_quant.ckpt.pipeline import WriteOptions
from megatron_quant.ckpt.plan import ExportPlan, plan_export
from megatron_quant.ckpt.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.serving import check_serving
from megatron_quant.ckpt.source import carry_over
from megatron_quant.ckpt.transcode import plan_of, transcode, whole_tensors
from megatron_quant.ckpt.verify import verify
from megatron_quant.ckpt.writer import export
from megatron_quant.dist import Groups, together
from megatron_quant.models import lookup


@dataclass(frozen=True)
class ExportOptions:
    """One run of ``export``; every field is the flag of the same name."""

    source: Path
    export_dir: Path
    export_format: str
    max_shard_size: str = "5GB"
    overwrite: bool = False
    serve_engine: str | None = None
    serve_tp: int | None = None
    io_threads: int = 2
    fsync: bool = True
    resume: bool = False


def reexport(options: ExportOptions, groups: Groups, phases: Phases) -> ExportPlan:
    """Write ``options.source`` in ``options.export_format``; the ranks share the work.

    Collective. Raises a QuantError, the same on every rank; an unfinished export is removed (with
    ``options.resume``: kept, to be continued).
    """
    existing = existing_of(options.overwrite, options.resume)
    writing = WriteOptions(options.io_threads, options.fsync)
    checkpoint = together(groups, lambda: QuantizedCheckpoint(options.source))
    together(groups, lambda: check_not_source(options.export_dir, options.source))
    fused = lookup(checkpoint.config).params(checkpoint.config)
    params = whole_tensors(fused)
    quant = together(groups, lambda: plan_of(checkpoint, params))
    dialect = get_dialect(options.export_format)
    check_serving(quant, fused, dialect.name, options.serve_engine, options.serve_tp)
    layout = Layout.simulate(groups.size, 1, 1, 1)
    dtype = checkpoint.tensors[params[0].name].dtype
    plan = plan_export(params, quant, dialect, layout, dtype, parse_size(options.max_shard_size))
    origin = together(groups, lambda: _origin(checkpoint, options))
    carried = carry_over(options.source)
    files = companions(checkpoint.config, quant, dialect, dtype, carried, origin)
    own = sum(part.nbytes for part in plan.parts_of(groups.rank))
    with phases.transfer("export", own) as progress:
        produce = partial(transcode, checkpoint=checkpoint)
        export(plan, groups, produce, options.export_dir, files, existing, progress, writing)
    together(groups, lambda: _verify(options) if groups.rank == 0 else None)
    return plan


def _origin(checkpoint: QuantizedCheckpoint, options: ExportOptions) -> Origin:
    """The recipe is whatever the source's config says of its quantization."""
    recipe = digest_of(checkpoint.config.get("quantization_config"))
    return Origin(recipe, source_digest(options.source))


def _verify(options: ExportOptions) -> None:
    verify(options.export_dir).raise_for_problems()
