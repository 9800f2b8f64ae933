"""Rewrite a quantized checkpoint in another dialect, without a model."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_quant.ckpt.convert import plan_of, transcode, whole_tensors
from megatron_quant.ckpt.dialects import get_dialect
from megatron_quant.ckpt.plan import (
    Companions,
    ExportPlan,
    Layout,
    Origin,
    StorageRules,
    companions,
    digest_of,
    plan_export,
    source_digest,
)
from megatron_quant.ckpt.read import QuantizedCheckpoint, params_of
from megatron_quant.ckpt.storage import read_object
from megatron_quant.dist import Groups, together
from megatron_quant.documents import INDEX
from megatron_quant.engines import check_serving
from megatron_quant.folding import DOCUMENT
from megatron_quant.models import Role, has_stacks_alone
from megatron_quant.runs.agree import check_options, check_plans
from megatron_quant.runs.destination import (
    check_place,
    destination,
    verification,
    with_beside,
    write_shown,
)
from megatron_quant.runs.phases import Phases
from megatron_quant.runs.settings import Serve, Write


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """One run of ``export``. Each field is the flag of that name, or a group of flags."""

    source: Path
    export_dir: Path
    export_format: str
    serve: Serve = field(default_factory=Serve)
    write: Write = field(default_factory=Write)


@dataclass(frozen=True)
class Rewritten:
    """The files that were written.

    left_out: what the source has and they lack, one line each.
    """

    plan: ExportPlan
    left_out: tuple[str, ...]


def reexport(options: ExportOptions, groups: Groups, phases: Phases) -> Rewritten:
    """Write ``options.source`` in ``options.export_format``; the ranks share the work.

    Collective. Raises the same QuantError on every rank. An unfinished export is then removed;
    ``options.write.resume`` keeps it, to be continued.
    """
    check_options(options, groups)
    work = together(groups, lambda: _planned(options, groups.size))
    check_plans(groups, work.origin, work.plan)
    plan, files, out = work.plan, work.files, options.export_dir
    check = verification(options.write, out, None, groups, phases)
    to = destination(options.write, out, files, check)
    write_shown(plan, groups, partial(transcode, checkpoint=work.checkpoint), to, phases)
    return Rewritten(plan, files.left_out)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """All that is known before a tensor is read."""

    checkpoint: QuantizedCheckpoint
    plan: ExportPlan
    files: Companions
    origin: Origin


def _planned(options: ExportOptions, world: int) -> _Work:
    """Plan the work and write nothing. Raises a QuantError for whatever does not fit."""
    checkpoint = QuantizedCheckpoint(options.source)
    check_place(options.export_dir, options.source)
    fused = params_of(checkpoint)
    params = whole_tensors(fused)
    quant = plan_of(checkpoint, params)
    dialect = get_dialect(options.export_format)
    serve = options.serve
    check_serving(quant, fused, dialect.name, serve.engine, serve.tp, checkpoint.config)
    layout = Layout.simulate(world, 1, 1, 1)
    embedding = next(param for param in params if param.role is Role.EMBEDDING)
    dtype = checkpoint.tensors[embedding.name].dtype
    kept = {name: info.dtype for name, info in checkpoint.tensors.items()}
    rules = StorageRules(
        dialect=dialect,
        dtype=dtype,
        max_shard_bytes=options.write.shard_bytes,
        kept=kept,
        stacked=has_stacks_alone(checkpoint.config),
    )
    plan = plan_export(params, quant, layout, rules)
    origin = _origin(checkpoint, options)
    files = companions(checkpoint.config, quant, dialect, dtype, origin=origin)
    files = with_beside(files, options.source, checkpoint)
    if (options.source / DOCUMENT).exists():
        files = files.with_document(DOCUMENT, read_object(options.source / DOCUMENT, INDEX))
    return _Work(
        checkpoint=checkpoint,
        plan=plan,
        files=files,
        origin=origin,
    )


def _origin(checkpoint: QuantizedCheckpoint, options: ExportOptions) -> Origin:
    """Digest the source; the quantization in its config stands for the recipe."""
    recipe = digest_of(checkpoint.config.get("quantization_config"))
    return Origin(recipe, source_digest(options.source))
