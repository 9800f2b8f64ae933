"""The front door for live models: quantize, export, save, restore."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_quant.alike import check_alike, ids_once_a_host
from megatron_quant.calib import read_calibration
from megatron_quant.ckpt.dialects import Dialect, get_dialect
from megatron_quant.ckpt.plan import (
    Companions,
    ExportPlan,
    Origin,
    StorageRules,
    companions,
    digest_of,
    plan_export,
    recipe_digest,
    slots,
)
from megatron_quant.ckpt.read import Weights, kept_dtypes, logical, open_source
from megatron_quant.ckpt.verify import Report
from megatron_quant.ckpt.write import Existing, check_target, in_memory
from megatron_quant.ckpt.write import export as write_files
from megatron_quant.dist import Groups, together
from megatron_quant.engines import check_serving
from megatron_quant.errors import CalibrationError, ExportError
from megatron_quant.folding import DOCUMENT
from megatron_quant.layers import ExpertScales
from megatron_quant.mcore.checkpoint import open_saved
from megatron_quant.mcore.live import (
    AttachSettings,
    Quantized,
    attach_recipe,
    calibrate_quantized,
    producer,
    quantized,
)
from megatron_quant.mcore.model import (
    check_shares,
    own_share,
    run_through,
    start_distributed,
)
from megatron_quant.models import CARRIED, Param, has_stacks_alone, text_config
from megatron_quant.recipes import QuantPlan, Recipe, refuse_output
from megatron_quant.runs.batches import calibration_batches, input_rules, keep_settings
from megatron_quant.runs.destination import (
    check_place,
    destination,
    existing_of,
    verification,
    with_beside,
)
from megatron_quant.runs.options import dtype_of
from megatron_quant.runs.phases import Quiet
from megatron_quant.runs.saving import SavePlace, save_model
from megatron_quant.runs.settings import Calibration, Serve, Write
from megatron_quant.streaming import PartSource, unscaled

Chunks = nn.Module | Sequence[nn.Module]
HFSource = str | Path | Mapping[str, Any]


def quantize(
    model: Chunks,
    recipe: str | Recipe,
    forward_loop: Callable[[Any], None] | None = None,
    *,
    hf_model: HFSource,
    expert_scales: str = "shared",
    calibration: Calibration = Calibration(),
    groups: Groups | None = None,
) -> Quantized:
    """Quantize a live Megatron model in place: attach quantizers and calibrate them. Collective.

    Args:
        model: this rank's GPTModel, or the list of its pipeline chunks, wrapped
            (Float16Module, DistributedDataParallel) or not.
        recipe: a Recipe, or what ``--export-quant-cfg`` takes: a name, a YAML path, a ModelOpt
            preset.
        forward_loop: runs the calibration data through ``model``, its only argument; every rank
            calls it. gptq runs it again, several times if its second moments do not fit
            ``calibration.memory``. None runs the text of ``calibration``, with the tokenizer in
            ``hf_model``.
        hf_model: the model's Hugging Face directory, hub id or config. Recipes use its names of
            weights.
        expert_scales: ``shared`` for one weight scale for all experts of a layer, or
            ``per_expert``.
        groups: the ranks that hold the model; None for all of torch.distributed's.

    Returns:
        The handle. :func:`quantized` finds it again on the model.

    Raises:
        QuantError: on every rank alike, for a model that is not the config's, a recipe that does
            not fit, or data that does not reach every layer.
    """
    groups = groups or start_distributed()
    handle = attach_recipe(
        model,
        recipe,
        hf_model,
        groups,
        AttachSettings(expert_scales=_expert_scales(expert_scales), of_weights=True),
    )
    steps: list[Callable[[], object]] = []
    load = calibration.load
    file = together(groups, lambda: read_calibration(load)) if load else None
    count = None
    if handle.plan.needs_data and file is None:
        if forward_loop is not None:
            steps = [partial(forward_loop, model)]
        else:
            batches = _batches(handle, calibration, groups)
            if handle.plan.weighs_inputs:
                check_shares(batches)
            own = own_share(batches)
            steps, count = [partial(run_through, handle.model.chunks, own)], len(own)
    rules, keep = input_rules(calibration, file, count), keep_settings(calibration)
    return calibrate_quantized(handle, steps, rules, keep)


def _expert_scales(name: str) -> ExpertScales:
    try:
        return ExpertScales(name)
    except ValueError:
        known = ", ".join(scales.value for scales in ExpertScales)
        raise CalibrationError(f"expert_scales={name!r}: give one of {known}") from None


def _batches(handle: Quantized, calibration: Calibration, groups: Groups) -> list[torch.Tensor]:
    """Read the text of ``calibration``. Collective."""
    hf = handle.hf

    def read() -> list[torch.Tensor]:
        source = calibration.tokenizer or hf.directory
        if source is None:
            raise CalibrationError(
                f"recipe {handle.recipe.name!r} is calibrated on data: give a forward_loop, or a "
                "tokenizer, either in calibration or in the directory that hf_model names"
            )
        return calibration_batches(calibration, Path(source), text_config(hf.config)["vocab_size"])

    return ids_once_a_host(groups, read)


@dataclass(frozen=True)
class Exported:
    """An export that was written.

    plan: its files. verified: what verification found; None if ``write`` skips it.
    left_out: what the source has and the export lacks, one line each.
    """

    plan: ExportPlan
    verified: Report | None
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Described:
    """The files of an export, their tensors, and what produces the values."""

    plan: ExportPlan
    files: Companions
    produce: Any


def export(
    model: Quantized | Chunks,
    out: str | Path,
    *,
    format: str = "modelopt",
    dtype: str | None = None,
    serve: Serve = Serve(),
    write: Write = Write(),
) -> Exported:
    """Write the serving checkpoint of a quantized live model. Collective.

    The bytes do not depend on the layout. What Megatron does not hold (draft layers, tokenizer
    files) is carried over from the Hugging Face directory.

    Args:
        model: the handle that :func:`quantize` returned, or the model itself.
        out: the directory to write. It must not hold a checkpoint, unless ``write`` allows it.
        format: ``modelopt``, ``compressed-tensors``, ``gptq``, ``awq``, ``auto-round`` or
            ``fp8``.
        dtype: of what is not quantized: ``bf16``, ``fp16`` or ``fp32``; None for the model's.

    Raises:
        QuantError: on every rank alike. What was written is then removed; ``write.resume`` keeps
            it, to be continued.
    """
    handle, directory = quantized(model), Path(out)
    groups = handle.model.groups

    def described() -> _Described:
        found = _describe(handle, format, serve, write.shard_bytes, dtype)
        if handle.hf.directory is not None:
            check_place(directory, handle.hf.directory)
        check_target(directory, found.files, existing_of(write), found.plan)
        return found

    found = together(groups, described)
    check = verification(write, directory, None, groups, Quiet())
    to = destination(write, directory, found.files, check)
    write_files(found.plan, groups, found.produce, to)
    return Exported(found.plan, check.report if check else None, found.files.left_out)


def _describe(
    handle: Quantized, format: str, serve: Serve, shard_bytes: int, dtype_name: str | None
) -> _Described:
    model, dialect = handle.model, get_dialect(format)
    source = _weights_beside(handle)
    kept = kept_dtypes(source) if source else {}
    carried = _carried_params(source, model.params)
    dtype = model.dtype if dtype_name is None else dtype_of(dtype_name)
    params = (*model.params, *carried)
    quant = handle.plan.beside(slots(carried))
    check_serving(quant, params, dialect.name, serve.engine, serve.tp, handle.hf.config)
    dialect.quantization_config(quant)  # refuses what it cannot store
    rules = StorageRules(
        dialect=dialect,
        dtype=dtype,
        max_shard_bytes=shard_bytes,
        kept=kept,
        stacked=has_stacks_alone(handle.hf.config),
    )
    plan = plan_export(params, quant, model.layout, rules)
    made = unscaled(PartSource(source, dtype), quant) if source and carried else None
    produce = producer(model, handle.layers, handle.cached, made)
    return _Described(plan, _files(handle, quant, dialect, dtype, source), produce)


def _files(
    handle: Quantized,
    quant: QuantPlan,
    dialect: Dialect,
    dtype: torch.dtype,
    source: Weights | None,
) -> Companions:
    report = handle.report
    found = (report.weight_amax, report.input_amax, report.moments) if report else ()
    statistics = digest_of([handle.expert_scales.value, *found, handle.kv_amax])
    origin = Origin(recipe_digest(handle.recipe), handle.source, statistics=statistics)
    files = companions(handle.hf.config, quant, dialect, dtype, origin=origin)
    if handle.fold.vectors:
        files = files.with_document(DOCUMENT, handle.fold.document())
    return with_beside(files, handle.hf.directory, source) if handle.hf.directory else files


def _weights_beside(handle: Quantized) -> Weights | None:
    """Open the weights in the Hugging Face directory; None if it has none."""
    return open_source(handle.hf.weights) if handle.hf.weights else None


def _carried_params(source: Weights | None, live: Sequence[Param]) -> tuple[Param, ...]:
    """Return what lies beside the ``live`` parameters in the Hugging Face checkpoint."""
    if source is None:
        return ()
    held = {s.name for param in live for s in param.sources}
    beside = (p for p in logical(source)[1].params if p.role in CARRIED)
    return tuple(p for p in beside if not held.intersection(s.name for s in p.sources))


def save(model: Quantized | Chunks, directory: str | Path) -> None:
    """Save a quantized live model as a Megatron checkpoint (torch_dist). Collective.

    It can be restored, exported or trained on at any layout. A checkpoint of this library in
    ``directory`` is replaced. Raises ExportError, on every rank alike, if the disk refuses, or if
    ``directory`` holds files that this library did not write; nothing is left of it then. Raises
    RecipeError for a model whose output layer is quantized.
    """
    handle = quantized(model)
    together(handle.model.groups, lambda: refuse_output(handle.plan))
    hf, place = handle.hf, SavePlace(Path(directory), Existing.REPLACE)
    save_model(handle.model, place, hf.directory, hf.config, handle.model.groups)


def restore(
    model: Chunks, directory: str | Path, *, hf_model: HFSource, groups: Groups | None = None
) -> Quantized:
    """Fill a live model and its quantizers from a checkpoint that :func:`save` wrote. Collective.

    model: an unquantized one of the same architecture, at any layout. Raises CheckpointError, on
    every rank alike, if the checkpoint is another model's or does not say how it is quantized.
    """
    groups = groups or start_distributed()
    saved = open_saved(Path(directory), groups)
    if saved.recipe is None:
        raise CalibrationError(
            f"{directory} does not say how it is quantized: it was saved without megatron_quant; "
            "restore one that mq.save wrote"
        )
    return attach_recipe(model, saved.recipe, hf_model, groups, AttachSettings(saved))


def export_tensors(
    model: Quantized | Chunks,
    *,
    format: str = "modelopt",
    dtype: str | None = None,
    ranks: Sequence[int] | None = None,
    max_bytes: int = 1 << 28,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every (name, tensor) of the export, in the order of the model, without a disk.

    The tensors, on the CPU, have the bytes that :func:`export` writes. Collective: every rank
    iterates to the end, in step, with the same arguments.

    Args:
        format, dtype: as in :func:`export`.
        ranks: those that get the tensors, counted in the model's group; None for all. The others
            send what they hold, and yield nothing.
        max_bytes: bytes of tensors that are made at a time; a larger tensor is made alone. While
            they travel, a rank holds up to three times as much.

    Raises:
        QuantError: on every rank alike.
    """
    handle = quantized(model)
    groups = handle.model.groups
    said = {"format": format, "dtype": dtype, "ranks": ranks, "max_bytes": max_bytes}
    check_alike(groups, **{name: str(value) for name, value in said.items()})

    def described() -> _Described:
        if ranks is not None and len(set(ranks) & set(range(groups.size))) != len(ranks):
            raise ExportError(
                f"ranks={list(ranks)}: give each of the model's ranks, 0 to {groups.size - 1}, "
                "once at most"
            )
        return _describe(handle, format, Serve(), 1 << 62, dtype)

    found = together(groups, described)
    yield from in_memory(found.plan, found.produce, groups, max_bytes, ranks)
