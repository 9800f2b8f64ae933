"""Keep the scales of a source that is quantized already: same format, same grid."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from megatron_quant.ckpt.dialects import describe_format
from megatron_quant.ckpt.read.quantized import QuantizedCheckpoint
from megatron_quant.ckpt.read.source import Weights
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import Format, Region
from megatron_quant.models import Box
from megatron_quant.recipes import Decision, QuantPlan

_FLAG = "--keep-scales"
_WITHOUT = f"leave out {_FLAG}"
Scales = dict[str, torch.Tensor]


def keeping(
    plan: QuantPlan, checkpoint: Weights, finer: bool = False
) -> tuple[QuantPlan, QuantizedCheckpoint]:
    """Return ``plan`` with the source's scale dtypes, and the source that has the scales.

    finer: whether weights in MXFP4 may become NVFP4, with scales of the same values.
    Raises CheckpointError for the first weight whose grid in the source is not the plan's.
    """
    if not isinstance(checkpoint, QuantizedCheckpoint):
        raise CheckpointError(f"{checkpoint.path} has no scales to keep; {_WITHOUT}")
    kept = tuple(_kept(d, checkpoint, finer) if d.quantized else d for d in plan.decisions)
    return replace(plan, decisions=kept), checkpoint


def _kept(decision: Decision, checkpoint: QuantizedCheckpoint, finer: bool) -> Decision:
    first = decision.slot.sources[0]
    if decision.algorithm != "max":
        raise CheckpointError(
            f"{first}: the recipe searches its scales ({decision.algorithm}), which does not go "
            f"with {_FLAG}; take algorithm max, or {_WITHOUT}"
        )
    modules = decision.slot.sources
    formats = [_own_format(module, decision, checkpoint, finer) for module in modules]
    if len(set(formats)) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: the scales of {first} have another dtype than those of the "
            f"weights that engines fuse with it; {_WITHOUT}"
        )
    return replace(decision, weights=formats[0])


def _own_format(
    module: str, decision: Decision, checkpoint: QuantizedCheckpoint, finer: bool
) -> Format:
    """Return the source's format for ``decision``; it may differ only in the scales' dtype."""
    assert decision.weights is not None
    found = checkpoint.modules.get(module)
    where = f"{checkpoint.path}: {module}"
    if found is None:
        raise CheckpointError(
            f"{where} is not quantized, so it has no scales to keep; exclude it, or {_WITHOUT}"
        )
    if finer and (found.weights.name, decision.weights.name) == ("mxfp4", "nvfp4"):
        return decision.weights
    if (found.weights.name, found.weights.group_size) != _grid(decision.weights):
        wanted = describe_format(replace(found, weights=decision.weights, inputs=None))
        own = describe_format(replace(found, inputs=None))
        raise CheckpointError(
            f"{where} is in {own}, whose scales do not fit {wanted}; take a recipe with that "
            f"format, exclude it, or {_WITHOUT}"
        )
    if checkpoint.packed(module).column_scale is not None:
        raise CheckpointError(
            f"{where} has factors on its inputs (pre_quant_scale), without which its codes are "
            f"another weight's; {_WITHOUT}"
        )
    if checkpoint.packed(module).group_of_column is not None:
        raise CheckpointError(
            f"{where} has its columns in another order (g_idx), so an export cannot have its "
            f"groups; {_WITHOUT}"
        )
    return found.weights


def _grid(fmt: Format) -> tuple[str, int]:
    return fmt.name, fmt.group_size


def kept_scales(checkpoint: QuantizedCheckpoint, module: str, region: Region) -> Scales:
    """Read the scales of all blocks of a weight that ``region`` touches, and the tensor's."""
    return checkpoint.packed(module).scales(Box(region.start, region.size))


def check_fused(plan: QuantPlan, checkpoint: QuantizedCheckpoint) -> None:
    """Run :func:`check_shared` on all that ``plan`` fuses; read one block of scales of each."""
    fused: dict[str, list[str]] = {}
    for decision in plan.quantized:
        if decision.weights and decision.weights.tensor_scale:
            slot = decision.slot
            fused.setdefault(slot.fused or slot.name, []).extend(slot.sources)
    corner = Box((0, 0), (1, 1))
    for modules in fused.values():
        if len(modules) > 1:
            found = {m: checkpoint.packed(m).scales(corner) for m in modules}
            check_shared(found, checkpoint.path)


def check_shared(found: Mapping[str, Scales], path: object) -> None:
    """Raise CheckpointError if fused modules have unequal NVFP4 tensor scales.

    Engines use one of them for all. found: scales by module.
    """
    scales = {m: s["tensor_scale"].item() for m, s in found.items() if "tensor_scale" in s}
    if len(set(scales.values())) > 1:
        low, high = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
        raise CheckpointError(
            f"{path}: {low} and {high} have tensor scales {scales[low]:g} and {scales[high]:g}, "
            f"but engines would use one for both; {_WITHOUT}"
        )
