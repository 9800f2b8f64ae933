"""The flags of ``quantize``, as values. Nothing here imports torch."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_quant.errors import CheckpointError, QuantError, RecipeError
from megatron_quant.faults import MINUTES
from megatron_quant.recipes import (
    Recipe,
    load_recipe,
    weight_only,
    with_algorithm,
    with_alpha,
    with_damp,
    with_kv_cache,
    with_mtp,
)
from megatron_quant.runs.settings import AutoQuantize, Calibration, Parallel, Serve, Write

if TYPE_CHECKING:
    import torch

    from megatron_quant.mcore.checkpoint import Saved

DTYPES = ("bf16", "fp16", "fp32")
"""The values of ``--dtype``."""


def dtype_of(name: str) -> "torch.dtype":
    """Return the dtype that ``--dtype`` calls ``name``, one of :data:`DTYPES`."""
    import torch

    if name not in DTYPES:
        raise QuantError(f"dtype={name!r}: give one of {', '.join(DTYPES)}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """One run of ``quantize``. Each field is the flag of that name, or a group of flags.

    ``export_dir`` may be None for a dry run, and with ``megatron_save_path``. ``algorithm``,
    ``damp``, ``alpha`` and ``export_kv_cache_quant`` replace what the recipe says, unless they are
    None. With ``megatron_load_path``, weights and quantizers come from that checkpoint;
    ``hf_model_id``, ``export_quant_cfg`` and ``expert_scales`` may then be None, for those saved
    with it. If it has no quantizers, weights alone come from it. ``skip_keys``: patterns of its
    keys to leave out. ``quantize_mtp``: let the recipe's rules take layers for speculation too.
    """

    hf_model_id: str | None
    export_quant_cfg: str | Recipe | None
    export_dir: Path | None = None
    export_format: str = "modelopt"
    dtype: str = "bf16"
    parallel: Parallel = field(default_factory=Parallel)
    calibration: Calibration = field(default_factory=Calibration)
    serve: Serve = field(default_factory=Serve)
    write: Write = field(default_factory=Write)
    auto: AutoQuantize = field(default_factory=AutoQuantize)
    weight_only: bool = False
    expert_scales: str | None = None
    algorithm: str | None = None
    damp: float | None = None
    alpha: float | None = None
    export_kv_cache_quant: str | None = None
    keep_scales: bool = False
    quantize_mtp: bool = False
    eval_text: Path | None = None
    stream: bool = False
    megatron_save_path: Path | None = None
    megatron_load_path: Path | None = None
    skip_keys: tuple[str, ...] = ()
    report: Path | None = None
    log_to: str | None = None
    distributed_timeout_minutes: float = MINUTES

    @classmethod
    def from_flags(cls, **flags: Any) -> "QuantizeOptions":
        """Make options of the command line's flags; ignore flags that are not among them.

        flags: values by the flag's name, with underscores. A missing flag gets its default.
        """
        groups = {
            "parallel": Parallel.from_flags(flags),
            "calibration": Calibration.from_flags(flags),
            "serve": Serve.from_flags(flags),
            "write": Write.from_flags(flags),
            "auto": AutoQuantize.from_flags(flags),
        }
        own = {f.name: flags[f.name] for f in fields(cls) if f.name in flags}
        own["skip_keys"] = tuple(own.get("skip_keys", ()))
        own = {"hf_model_id": None, "export_quant_cfg": None} | own
        return cls(**(own | groups))

    def __post_init__(self) -> None:
        """Refuse flags that exclude one another. Names are checked when they are resolved."""
        if self.dtype not in DTYPES:
            raise QuantError(f"--dtype is {self.dtype!r}: give one of {', '.join(DTYPES)}")
        if self.keep_scales and self.dtype == "fp16":
            raise QuantError(
                "--keep-scales does not go with --dtype fp16, which cannot hold small products of "
                "a code and its scale: use bf16 or fp32"
            )
        if isinstance(self.skip_keys, str):
            raise QuantError(f"skip_keys is {self.skip_keys!r}: give a tuple of patterns")
        if self.skip_keys and self.megatron_load_path is None:
            raise QuantError("--skip-keys leaves out keys of --megatron-load-path: give that too")
        if self.auto.bits is not None:
            self._check_search()
        elif (unused := self.auto.changed) is not None:
            flag = unused.replace("_", "-")
            raise QuantError(
                f"--auto-quantize-{flag} is for a search: add --auto-quantize-bits, or leave it out"
            )
        elif self.megatron_load_path is None and None in (self.hf_model_id, self.export_quant_cfg):
            raise QuantError(
                "quantize needs --hf-model-id and --export-quant-cfg, or --megatron-load-path"
            )

    def _check_search(self) -> None:
        if self.quantize_mtp:
            raise QuantError(
                "--auto-quantize-bits leaves layers for speculation as they are: leave out "
                "--quantize-mtp, or give it with the found recipe to another run"
            )
        if self.export_quant_cfg is not None:
            raise QuantError(
                "--auto-quantize-bits searches for a recipe, and --export-quant-cfg gives one: "
                "leave one of them out; --auto-quantize-formats names the candidates"
            )
        if self.auto.head is not None and not self.stream:
            raise QuantError(
                "--auto-quantize-head is for transformers' forward of a model without an output "
                "layer: add --stream"
            )
        unnamed = self.hf_model_id is None and self.megatron_load_path is None
        if unnamed or self.keep_scales:
            raise QuantError(
                "--auto-quantize-bits needs --hf-model-id or --megatron-load-path, and no "
                "--keep-scales"
            )
        if self.stream and self.megatron_load_path is not None:
            raise QuantError(
                "--auto-quantize-bits searches a training run's checkpoint in Megatron's model: "
                "leave out --stream"
            )


def check_not_searched(options: QuantizeOptions) -> None:
    """Raise QuantError if the recipe is still to be found."""
    if options.auto.bits is not None:
        raise QuantError(
            "--dry-run plans without weights, and --auto-quantize-bits reads them: leave one out"
        )


def check_unreported(options: QuantizeOptions) -> None:
    """Raise QuantError if a plan, which measures nothing, is to be reported."""
    for flag, value in (("--report", options.report), ("--log-to", options.log_to)):
        if value is not None:
            raise QuantError(f"--dry-run measures nothing that {flag} could say: leave one out")


def check_plannable(options: QuantizeOptions) -> None:
    """Raise QuantError if config.json alone does not decide what would be done."""
    if options.megatron_load_path is not None:
        raise QuantError("--dry-run plans from config.json: leave out --megatron-load-path")


def chosen_recipe(options: QuantizeOptions, saved: "Saved | None") -> Recipe:
    """Return the recipe, changed by the other flags.

    saved: what ``options.megatron_load_path`` holds. Raises RecipeError if the recipe is malformed
    or does not go with the flags, CheckpointError if neither flags nor ``saved`` name one.
    """
    if options.export_quant_cfg is not None:
        recipe = load_recipe(options.export_quant_cfg)
    elif saved is not None and saved.recipe is not None:
        recipe = saved.recipe
    else:
        said = "does not say how it is quantized (it was saved without megatron_quant)"
        if saved is None:
            said = "is not quantized"
        raise CheckpointError(
            f"{options.megatron_load_path} {said}: run quantize with --megatron-load-path, "
            "--hf-model-id and the recipe in --export-quant-cfg"
        )
    recipe = _changed(recipe, options)
    if options.weight_only and recipe.kv_cache == "fp8":
        raise RecipeError(
            "--export-kv-cache-quant fp8 needs calibration, but --weight-only runs no data: "
            "take fp8_cast, or leave out --weight-only"
        )
    return recipe


def _changed(recipe: Recipe, options: QuantizeOptions) -> Recipe:
    """Return ``recipe`` with what the other flags change in it."""
    if options.weight_only:
        recipe = weight_only(recipe)
    if options.algorithm is not None:
        recipe = with_algorithm(recipe, options.algorithm)
    if options.damp is not None:
        recipe = with_damp(recipe, options.damp)
    if options.alpha is not None:
        recipe = with_alpha(recipe, options.alpha)
    if options.quantize_mtp:
        recipe = with_mtp(recipe)
    if options.export_kv_cache_quant is not None:
        recipe = with_kv_cache(recipe, options.export_kv_cache_quant)
    return recipe
