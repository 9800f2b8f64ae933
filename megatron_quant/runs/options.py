"""What a user asks for: the flags of ``quantize``, as values."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_quant.errors import CheckpointError, ExportError, QuantError, RecipeError
from megatron_quant.recipes import Recipe, load_recipe, weight_only, with_algorithm, with_kv_cache

if TYPE_CHECKING:
    import torch

    from megatron_quant.mcore.checkpoint import Saved

DTYPES = ("bf16", "fp16", "fp32")
"""What ``--dtype`` may be."""
_COUNTS = (
    *("tp", "pp", "ep", "etp"),
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    *("calib_size", "calib_seq_length", "calib_batch_size"),
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def dtype_of(name: str) -> "torch.dtype":
    """The dtype that ``--dtype`` calls ``name``, one of :data:`DTYPES`."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``200MB`` or a plain number; ExportError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)?", text.strip(), re.IGNORECASE)
    unit = (match.group(2) or "").upper() if match else None
    if match is None or unit not in (*_UNITS, "B"):
        raise ExportError(f"--max-shard-size {text!r} is no size: write it as 5GB or 200MB")
    size = int(float(match.group(1)) * _UNITS.get(unit, 1))
    if size < 1:
        raise ExportError(f"--max-shard-size {text!r} is nothing: give at least a few MB")
    return size


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """One run of ``quantize``; every field is the flag of the same name.

    Sizes of calibration are in samples and tokens. ``export_dir`` may be None for a dry run, and
    with ``megatron_save_path``. ``algorithm`` and ``export_kv_cache_quant`` replace what the recipe
    says; None leaves it. With ``megatron_load_path``, where weights and quantizers come from then,
    ``hf_model_id``, ``export_quant_cfg`` and ``expert_scales`` may be None: what was saved with it.
    """

    hf_model_id: str | None
    export_quant_cfg: str | None
    export_dir: Path | None = None
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    num_virtual_stages_per_pipeline_rank: int = 1
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    weight_only: bool = False
    expert_scales: str | None = None
    calib_size: int = 512
    calib_seq_length: int = 512
    calib_batch_size: int = 4
    calib_dataset: str = "stdlib"
    cold_experts: str = "error"
    export_format: str = "modelopt"
    max_shard_size: str = "5GB"
    overwrite: bool = False
    dtype: str = "bf16"
    eval_text: Path | None = None
    algorithm: str | None = None
    act_percentile: float = 100.0
    export_kv_cache_quant: str | None = None
    serve_engine: str | None = None
    serve_tp: int | None = None
    keep_scales: bool = False
    io_threads: int = 2
    fsync: bool = True
    resume: bool = False
    stream: bool = False
    amax_file: Path | None = None
    megatron_save_path: Path | None = None
    megatron_load_path: Path | None = None

    def __post_init__(self) -> None:
        """Refuse counts below one; names are checked where they are resolved."""
        for flag in _COUNTS:
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise QuantError(f"--{flag.replace('_', '-')} is {value}: give at least 1")
        if self.keep_scales and self.dtype == "fp16":
            raise QuantError(
                "--keep-scales goes with --dtype bf16 or fp32: fp16 does not hold small products "
                "of a code and its scale"
            )
        if self.megatron_load_path is None and None in (self.hf_model_id, self.export_quant_cfg):
            raise QuantError(
                "quantize needs --hf-model-id and --export-quant-cfg, or --megatron-load-path"
            )
        if not 0 < self.act_percentile <= 100:
            raise QuantError(
                f"--act-percentile is {self.act_percentile:g}: give a percentage above 0, such as "
                "99.9; 100 clips nothing"
            )


def chosen_recipe(options: QuantizeOptions, saved: "Saved | None") -> Recipe:
    """The recipe as the other flags change it.

    saved: what ``options.megatron_load_path`` holds. Raises RecipeError for one that is malformed,
    or that the flags do not go with, CheckpointError where neither flags nor ``saved`` name one.
    """
    if options.export_quant_cfg is not None:
        recipe = load_recipe(options.export_quant_cfg)
    elif saved is not None and saved.recipe is not None:
        recipe = saved.recipe
    else:
        raise CheckpointError(
            f"{options.megatron_load_path} does not say how it is quantized (it was saved without "
            "megatron_quant): run quantize with --megatron-load-path, --hf-model-id and the recipe "
            "in --export-quant-cfg"
        )
    if options.weight_only:
        recipe = weight_only(recipe)
    if options.algorithm is not None:
        recipe = with_algorithm(recipe, options.algorithm)
    if options.export_kv_cache_quant is not None:
        recipe = with_kv_cache(recipe, options.export_kv_cache_quant)
    if options.weight_only and recipe.kv_cache == "fp8":
        raise RecipeError(
            "--export-kv-cache-quant fp8 is calibrated, but --weight-only runs no data: "
            "take fp8_cast, or leave out --weight-only"
        )
    return recipe
