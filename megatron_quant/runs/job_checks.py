"""Refuse flags that do not go with a resolved recipe, before any weight is read."""

from megatron_quant.errors import LayoutError, QuantError, RecipeError
from megatron_quant.folding import Places
from megatron_quant.mcore.checkpoint import Saved
from megatron_quant.recipes import QuantPlan, cache_slots, difference
from megatron_quant.runs.options import QuantizeOptions


def check_flags(options: QuantizeOptions, quant: QuantPlan, saved: Saved | None) -> None:
    """Raise a QuantError for calibration, evaluation and caches that do not fit the recipe."""
    _check_calibration(options, quant, saved)
    _check_evaluation(options, quant, saved)
    _check_samples(options, quant, saved)
    _check_cache(quant)
    _check_folding(options, quant)


def check_sequential(sequential: bool, places: Places) -> None:
    """Raise QuantError for layers that would be measured behind factors not yet found."""
    if sequential and places.folded:
        raise QuantError(
            "--sequential: factors of awq and smoothquant are found after all layers were measured,"
            " so no layer can be measured behind them; leave it out, or take gptq alone"
        )


def check_same(options: QuantizeOptions, quant: QuantPlan, saved: QuantPlan) -> None:
    """Raise RecipeError if the saved model was quantized otherwise than the flags ask."""
    if other := difference(quant, saved):
        raise RecipeError(
            f"{options.megatron_load_path} was saved with recipe {saved.recipe!r}, which treats "
            f"{other} differently than the flags ask: leave out --export-quant-cfg and the flags "
            "that change it"
        )


def _check_cache(quant: QuantPlan) -> None:
    """Raise RecipeError if the model caches no keys and values that could be calibrated."""
    if quant.kv_cache == "fp8" and not cache_slots(quant):
        raise RecipeError(
            "--export-kv-cache-quant fp8: latent attention caches keys and values as one vector, "
            "compressed, and engines read no calibrated scale for it; take fp8_cast, or none"
        )


def check_whole(options: QuantizeOptions) -> None:
    """Raise QuantError for what is done layer by layer, with a model that runs whole."""
    if options.calibration.sequential:
        raise QuantError(
            "--sequential goes layer by layer, and a Megatron model runs whole: add --stream, or "
            "leave it out"
        )


def _check_calibration(options: QuantizeOptions, quant: QuantPlan, saved: Saved | None) -> None:
    """Raise QuantError where nothing is calibrated that a calibration file could keep or give."""
    data = options.calibration
    flag = "--save-calibration" if data.save else "--load-calibration" if data.load else ""
    if flag and saved is not None:
        raise QuantError(
            f"{flag} does not go with --megatron-load-path, which has its scales: nothing is "
            "calibrated; leave one of them out"
        )
    if flag and not quant.needs_data:
        raise QuantError(f"{flag}: recipe {quant.recipe!r} needs no calibration data; leave it out")
    if data.expert_share is not None and not any(d.slot.expert is not None for d in quant.measured):
        raise QuantError(
            "--calib-experts: no expert's inputs are measured; leave it out, or take a recipe with "
            "static input scales, or --algorithm imatrix or gptq"
        )
    if data.sequential and not any(d.rounds for d in quant.quantized):
        raise QuantError(
            "--sequential: inputs behind quantized layers are measured only for algorithm gptq, "
            "which no rule has; leave it out"
        )
    if data.keep_hessians and not any(d.rounds for d in quant.quantized):
        raise QuantError(
            "--keep-hessians: second moments are measured only for algorithm gptq, which no rule "
            "has; leave it out"
        )


def _check_folding(options: QuantizeOptions, quant: QuantPlan) -> None:
    """Raise QuantError for flags that do not go with factors that are folded into weights."""
    if not quant.folds:
        return
    algorithm = next(d.algorithm for d in quant.quantized if d.folds)
    if options.keep_scales:
        raise QuantError(
            f"--keep-scales keeps the source's codes, and algorithm {algorithm} changes weights: "
            "leave one of them out"
        )
    if options.calibration.act_percentile < 100 and any(d.needs_peaks for d in quant.quantized):
        raise QuantError(
            f"--act-percentile does not go with algorithm {algorithm}, whose inputs change after "
            "they were counted: leave one of them out"
        )


def _check_evaluation(options: QuantizeOptions, quant: QuantPlan, saved: Saved | None) -> None:
    """Raise QuantError if the weights to compare with are gone."""
    if options.eval_text and saved is not None and any(d.rounds for d in quant.quantized):
        raise QuantError(
            "--eval-text compares with the weights before gptq, which --megatron-load-path lacks: "
            "run megatron-quant eval on the export, with --against"
        )


def _check_samples(options: QuantizeOptions, quant: QuantPlan, saved: Saved | None) -> None:
    """Refuse samples that need padding: padding would make the statistics depend on the layout."""
    calibrates = quant.needs_data and saved is None and options.calibration.load is None
    if options.eval_text or calibrates:
        check_length(options.calibration.seq_length, options.parallel.tp, options.parallel.cp)


def check_length(length: int, tp: int, cp: int = 1) -> None:
    """Raise LayoutError if ranks at these parallel sizes cannot share samples of this length."""
    cuts, flags = (tp, f"--tp {tp}") if cp == 1 else (2 * tp * cp, f"--tp {tp} x --cp {cp} x 2")
    if length % cuts:
        raise LayoutError(
            f"{flags} does not divide --calib-seq-length {length}: choose a multiple of {cuts}"
        )
