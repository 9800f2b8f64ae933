"""Leave weights in a source's own format where an export has the same form."""

import re
from collections.abc import Iterator
from dataclasses import replace

from megatron_quant.ckpt.dialects import Dialect, Layer, layer_of
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.read.source import Weights
from megatron_quant.errors import FormatError
from megatron_quant.models import DRAFTS
from megatron_quant.recipes import Decision, QuantPlan, Slot

_DRAFTS = tuple(role.value for role in DRAFTS)
_EXACT = "mxfp4"
"""What becomes NVFP4 without rounding."""
_EXPERT = re.compile(r"(.*\bexperts\.\d+)\.(w[13]|gate_proj|up_proj)")


def carrying(
    plan: QuantPlan, source: Weights | None, dialect: Dialect
) -> tuple[QuantPlan, Dialect]:
    """Return ``plan`` with the source's formats where it leaves weights alone, and their dialect.

    MXFP4 experts of layers for speculation get the format of the other experts. Their values stay.

    Args:
        plan: A resolved recipe.
        source: The checkpoint that is quantized.
        dialect: Dialect of the export, which carries weights, in any of its forms.

    Raises:
        FormatError: For a source of another form.
    """
    own = source.dialect if isinstance(source, QuantizedCheckpoint) else None
    if not isinstance(source, QuantizedCheckpoint) or own is None or own.name != dialect.name:
        raise FormatError(
            f"--export-format {dialect.name} carries what the release has in FP8, and the source "
            "is no such release; give the release, or export modelopt"
        )
    routed = next((d for d in plan.quantized if _is_expert(d)), None)
    decisions = tuple(_carried(d, source, routed) for d in plan.decisions)
    return replace(plan, decisions=decisions), own


def _carried(decision: Decision, source: QuantizedCheckpoint, routed: Decision | None) -> Decision:
    if decision.quantized:
        return decision
    found = {source.modules.get(module) for module in decision.slot.sources}
    fmt = found.pop() if len(found) == 1 else None
    if fmt is None:
        return decision
    kept = replace(decision, weights=fmt.weights, inputs=fmt.inputs, carried=True)
    is_draft = decision.slot.fixed in _DRAFTS and _is_expert(decision)
    if is_draft and routed is not None and fmt.weights.name == _EXACT:
        kept = replace(kept, weights=routed.weights, inputs=routed.inputs)
    return kept


def _is_expert(decision: Decision) -> bool:
    return layer_of(decision.slot.sources[0]) is Layer.EXPERT


def sharing(plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """Map slots of carried experts to the modules that engines fuse with them: gate and up."""
    fused: dict[str, list[str]] = {}
    for slot, key in _gates(plan):
        fused.setdefault(key, []).append(slot.sources[0])
    return {slot.name: tuple(fused[key]) for slot, key in _gates(plan)}


def _gates(plan: QuantPlan) -> Iterator[tuple[Slot, str]]:
    for decision in plan.quantized:
        match = _EXPERT.fullmatch(decision.slot.sources[0])
        if decision.carried and match is not None and len(decision.slot.sources) == 1:
            yield decision.slot, match[1]
