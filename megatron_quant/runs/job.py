"""Decide, from config.json and the flags alone, everything that needs no weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import Any

import torch

from megatron_quant.calib import MomentPass, moment_passes
from megatron_quant.ckpt.dialects import Dialect, get_dialect
from megatron_quant.ckpt.plan import (
    Cost,
    ExportPlan,
    Layout,
    Spread,
    StorageRules,
    measured,
    plan_export,
    slots,
    spread,
)
from megatron_quant.ckpt.read import Weights, carrying, check_weights, kept_dtypes, logical
from megatron_quant.ckpt.storage import read_config, resolve_source
from megatron_quant.engines import ENGINES, Obstacle, check_serving, obstacle
from megatron_quant.folding import Places, find_places
from megatron_quant.mcore.checkpoint import Saved, model_of_run
from megatron_quant.models import (
    Architecture,
    Param,
    Pipeline,
    check_context,
    check_layout,
    count_drafts,
    has_stacks_alone,
    lookup,
    lookup_live,
    num_experts,
    num_layers,
)
from megatron_quant.recipes import (
    EXPERT_SCALES,
    AuditRow,
    QuantPlan,
    Recipe,
    audit,
    cache_slots,
    refuse_output,
    resolve,
)
from megatron_quant.runs.drafts import quantized_drafts, saved_drafts
from megatron_quant.runs.job_checks import check_flags, check_same, check_sequential, check_whole
from megatron_quant.runs.options import QuantizeOptions, check_plannable, chosen_recipe, dtype_of
from megatron_quant.streaming import LayerMemory, layer_memory

OpenWeights = Callable[[Path], Weights]
"""Opens the weights of the model whose config.json is in a directory."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that passed every check that needs no weights.

    architecture: None for a streamed checkpoint, which needs no model. layout: in Megatron's
    default rank order. dialect, export: the files and, at that layout, who owns each part; None if
    nothing is exported. cost: what planning them took. expert_scales: whether experts share a
    weight amax. kept, checkpoint: as in :class:`SourceModel`. moments: passes over the data of
    gptq. expert_share: share of its layer's experts that a token is measured for; None for those
    of the router. places: where factors are folded. sequential: whether layers are measured behind
    those that gptq has rounded. mtp: layers for speculation of the live model.
    """

    source: Path
    hf_config: Mapping[str, Any]
    architecture: Architecture | None
    params: tuple[Param, ...]
    recipe: Recipe
    quant: QuantPlan
    dialect: Dialect | None
    layout: Layout
    dtype: torch.dtype
    export: ExportPlan | None
    cost: Cost | None
    expert_scales: str
    kept: Mapping[str, torch.dtype] = field(default_factory=dict)
    checkpoint: Weights | None = None
    moments: tuple[MomentPass, ...] = ()
    expert_share: float | None = None
    places: Places = field(default_factory=Places)
    sequential: bool = False
    mtp: int = 0

    @property
    def layer_memory(self) -> LayerMemory | None:
        """Return what a streamed calibration takes; None where there is none."""
        if self.architecture is not None or not self.quant.needs_data:
            return None
        return layer_memory(self.params, self.quant, self.dtype, self.hf_config)

    @property
    def exported(self) -> ExportPlan:
        """Return :attr:`export` of a run that exports."""
        assert self.export is not None, "nothing is exported"
        return self.export

    @property
    def coverage(self) -> list[AuditRow]:
        """How many weights each rule, and each of its patterns, decided on."""
        return audit(self.quant, self.recipe)

    @property
    def cache_scales(self) -> int:
        """Number of scales of the KV cache."""
        return len(cache_slots(self.quant))

    @property
    def spread(self) -> Spread:
        """Bytes that each of the layout's ranks writes, as a summary."""
        return spread(self.exported, self.layout.world)

    def servers(self, tp: int) -> dict[str, Obstacle | None]:
        """Return what keeps each engine from serving the export at a tensor-parallel size."""
        assert self.dialect is not None, "nothing is exported"
        name, config = self.dialect.name, self.hf_config
        return {e: obstacle(self.quant, self.params, name, e, tp, config) for e in ENGINES}


def prepare_job(
    options: QuantizeOptions,
    world: int,
    saved: Saved | None = None,
    open_weights: OpenWeights | None = None,
    config: Mapping[str, Any] | None = None,
) -> Job:
    """Check the flags against the model's config for ``world`` ranks.

    saved: what ``options.megatron_load_path`` holds. open_weights: opens the checkpoint, so that
    its layers for speculation go into the export; None to read config.json alone. config: the
    model's, if the source's folder has none.
    Raises a QuantError for whatever does not fit.
    """
    source = _source(options, saved)
    hf_config = read_config(source) if config is None else config
    runs = saved is not None or open_weights is not None
    architecture = lookup_live(hf_config) if runs else lookup(hf_config)
    checkpoint = open_weights(source) if open_weights is not None else None
    kept: Mapping[str, torch.dtype] = {}
    if checkpoint is not None:
        hf_config = checkpoint.config
        params, kept = logical(checkpoint)[1].params, kept_dtypes(checkpoint)
    else:
        held = saved_drafts(saved) if saved else chosen_recipe(options, saved).allows_mtp
        count = count_drafts(hf_config, ("mtp.",)) if held else 0
        params = architecture.with_drafts(hf_config, count)
    check_layout(hf_config, options.parallel.tp, options.parallel.ep, options.parallel.etp)
    check_context(hf_config, options.parallel.cp)
    stages = _pipeline(options).stages(num_layers(params))
    experts = num_experts(params)
    layout = Layout.simulate(
        world, options.parallel.tp, options.parallel.ep, options.parallel.etp, experts, stages
    ).sharing_sequences(options.parallel.cp)
    model = SourceModel(
        source=source,
        hf_config=hf_config,
        architecture=architecture,
        params=params,
        kept=kept,
        checkpoint=checkpoint,
    )
    job = decide(options, model, layout, saved)
    if checkpoint is None:
        return replace(job, mtp=count)
    check_weights(checkpoint, params)
    return replace(job, mtp=quantized_drafts(job.quant, checkpoint, params))


def planned(options: QuantizeOptions) -> Job:
    """Decide everything from config.json alone, for the fewest ranks that the layout takes.

    An export is planned even if the run would only save. Raises a QuantError for whatever does not
    fit.
    """
    check_plannable(options)
    sizes, exporting = options.parallel, replace(options, megatron_save_path=None)
    return prepare_job(exporting, lcm(sizes.tp * sizes.cp, sizes.ep * sizes.etp) * sizes.pp)


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """The model to quantize: its place, its config and its logical parameters.

    kept: dtypes of the Hugging Face tensors that keep their own, whatever the export's is.
    checkpoint: the weights; None if they are not read, or come from a Megatron checkpoint.
    """

    source: Path
    hf_config: Mapping[str, Any]
    architecture: Architecture | None
    params: tuple[Param, ...]
    kept: Mapping[str, torch.dtype] = field(default_factory=dict)
    checkpoint: Weights | None = None


def decide(
    options: QuantizeOptions, model: SourceModel, layout: Layout, saved: Saved | None = None
) -> Job:
    """Return the recipe's decisions on ``model`` and the files of its export.

    Raises a QuantError for whatever does not fit.
    """
    recipe, params = chosen_recipe(options, saved), model.params
    quant = resolve(recipe, slots(params))
    dialect = get_dialect(options.export_format)
    if dialect.carries:
        quant, dialect = carrying(quant, model.checkpoint, dialect)
    if model.architecture is not None:
        check_whole(options)
    if saved is not None or options.megatron_save_path is not None:
        refuse_output(quant)
    if saved is not None and saved.recipe is not None:
        check_same(options, quant, resolve(saved.recipe, slots(params)))
    check_flags(options, quant, saved)
    dtype = dtype_of(options.dtype)
    scales = options.expert_scales or (saved.expert_scales if saved else EXPERT_SCALES[0])
    job = Job(
        source=model.source,
        hf_config=model.hf_config,
        architecture=model.architecture,
        params=params,
        recipe=recipe,
        quant=quant,
        dialect=None,
        layout=layout,
        dtype=dtype,
        export=None,
        cost=None,
        expert_scales=scales,
        kept=model.kept,
        checkpoint=model.checkpoint,
        moments=_moments(options, quant, saved),
        expert_share=options.calibration.expert_share,
        places=Places() if saved else find_places(params, quant, model.hf_config),
        sequential=options.calibration.sequential,
    )
    check_sequential(job.sequential, job.places)
    if options.export_dir is None and options.megatron_save_path is not None:
        return job
    serve = options.serve
    check_serving(quant, params, dialect.name, serve.engine, serve.tp, model.hf_config)
    dialect.quantization_config(quant)  # refuses what it cannot store
    job = replace(job, dialect=dialect)
    rules = _rules(job, options)
    export, cost = measured(lambda: plan_export(params, quant, layout, rules))
    return replace(job, export=export, cost=cost)


def replanned(job: Job, quant: QuantPlan, options: QuantizeOptions) -> Job:
    """Replace the plan of ``job`` by ``quant``. Raises as :func:`prepare_job` does."""
    if job.dialect is None:
        return replace(job, quant=quant)
    export = plan_export(job.params, quant, job.layout, _rules(job, options))
    return replace(job, quant=quant, export=export)


def _rules(job: Job, options: QuantizeOptions) -> StorageRules:
    assert job.dialect is not None, "nothing is exported"
    return StorageRules(
        dialect=job.dialect,
        dtype=job.dtype,
        max_shard_bytes=options.write.shard_bytes,
        kept=job.kept,
        stacked=has_stacks_alone(job.hf_config),
    )


def _pipeline(options: QuantizeOptions) -> Pipeline:
    return Pipeline(
        options.parallel.pp,
        options.parallel.num_virtual_stages_per_pipeline_rank,
        options.parallel.num_layers_in_first_pipeline_stage,
        options.parallel.num_layers_in_last_pipeline_stage,
    )


def _source(options: QuantizeOptions, saved: Saved | None) -> Path:
    """Find the directory that has config.json and the tokenizer."""
    if options.hf_model_id is not None:
        return resolve_source(options.hf_model_id)
    assert saved is not None
    return model_of_run(saved.stored.path)[0]


def _moments(
    options: QuantizeOptions, quant: QuantPlan, saved: Saved | None
) -> tuple[MomentPass, ...]:
    """Return the passes over the data in which gptq rounds; none where it runs no data."""
    data = options.calibration
    if saved is not None or data.load is not None or options.stream:
        return ()
    return moment_passes(quant, options.parallel.ep, data.memory_bytes)
