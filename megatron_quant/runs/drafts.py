"""Layers for speculation (MTP) of a run: whether a plan quantizes them, and what it then needs."""

from collections.abc import Sequence

from megatron_quant.ckpt.read import Weights
from megatron_quant.errors import CheckpointError, RecipeError
from megatron_quant.mcore.checkpoint import Saved
from megatron_quant.models import Param, count_drafts, lookup
from megatron_quant.recipes import DRAFT, QuantPlan


def saved_drafts(saved: Saved) -> bool:
    """Return whether a quantized Megatron checkpoint has layers for speculation."""
    return any(key.startswith("mtp.") for key in saved.stored.shapes)


def quantized_drafts(plan: QuantPlan, checkpoint: Weights, params: Sequence[Param]) -> int:
    """Count the layers for speculation if ``plan`` quantizes any linear of them; 0 otherwise.

    params: what the files of ``checkpoint`` hold. Raises CheckpointError where these lack a part of
    the layers that are counted, or stack it.
    """
    if not any(d.slot.fixed == DRAFT for d in plan.quantized):
        return 0
    config = checkpoint.config
    count = count_drafts(config, checkpoint.dense())
    wanted = lookup(config).drafts(config, count)
    held = {param.name for param in params}
    missing = next((s for p in wanted if p.name not in held for s in p.sources), None)
    if missing is not None:
        raise CheckpointError(
            f"{checkpoint.path} has no {missing.name} of shape {list(missing.shape)}, which "
            "quantizing its layers for speculation needs (stacks of experts stay stacks there): "
            "fetch the checkpoint again, or leave out --quantize-mtp"
        )
    return count


def check_measurable(plan: QuantPlan) -> None:
    """Raise RecipeError for linears whose inputs no forward of ``--stream`` shows."""
    for decision in plan.measured:
        if decision.slot.fixed == DRAFT:
            raise RecipeError(
                f"--quantize-mtp: {decision.slot.sources[0]} is calibrated on data, and --stream "
                "runs transformers, which has no layers for speculation: add --weight-only, leave "
                "out --stream, or give --load-calibration of a run without it"
            )
