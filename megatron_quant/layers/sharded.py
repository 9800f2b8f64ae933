"""The amaxes of a grouped linear's quantizers in a distributed checkpoint.

Keys and shapes are ModelOpt's. An amax that all experts of a layer share (before 0.47) is
``...experts.linear_fc1.weight_quantizer._amax`` [1]. The amax of global expert 5 (since 0.47) is
``...experts.5.linear_fc1.weight_quantizer._amax`` [1]. If Megatron stacks experts (without
``singleton_local_shards``), their amaxes are stacked too: [experts, 1] under the shared key.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_quant.errors import QuantError
from megatron_quant.layers.grouped import QuantGroupedLinear

_QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")
_EXTRA = "_extra_state"

Offsets = tuple[tuple[int, int, int], ...]
"""(axis, index, count) of each axis that Megatron prepends for a layer's place in the model."""


@dataclass(frozen=True)
class Place:
    """This rank's place among those that hold a layer's experts.

    etp, ep, edp: its ranks in the expert tensor-, expert- and expert-data-parallel groups.
    experts: how many the layer has, on all ranks.
    """

    etp: int
    ep: int
    edp: int
    experts: int


def quantizer_state(
    layer: QuantGroupedLinear, prefix: str, offsets: Offsets, singleton: bool, place: Place
) -> dict[str, Any]:
    """Map the state name of every amax of the layer to its ShardedTensor (or factory).

    Raises QuantError for amaxes of rows or blocks (ModelOpt's own formats): they belong to a shard.
    """
    state: dict[str, Any] = {}
    for name in _QUANTIZERS:
        key, amax = f"{prefix}{name}._amax", getattr(getattr(layer, name), "_amax", None)
        if amax is None:
            continue
        if name == "weight_quantizer" and layer.per_expert:
            state[key] = _per_expert(amax, key, offsets, singleton, place)
        else:
            state[key] = _shared(amax, key, offsets, place)
    return state


def reserve_amaxes(layer: QuantGroupedLinear, loaded: Iterable[str]) -> None:
    """Make room for the layer's amaxes while ModelOpt restores its model.

    ``restore_sharded_modelopt_state`` converts the model without amaxes and loads ``_extra_state``
    alone, where other layers find theirs. Megatron then asks the model what to load. Without room
    for them, amaxes would not be among it.

    loaded: names of what is loaded into the layer; nothing is done for others.
    """
    names = list(loaded)
    if not names or not all(_EXTRA in name for name in names):
        return
    device = layer.weights()[0].device
    for name in _QUANTIZERS:
        quantizer = getattr(layer, name)
        calibrated = quantizer.is_enabled and not quantizer.is_mx_format and not quantizer._dynamic
        if calibrated and not hasattr(quantizer, "_amax"):
            apart = name == "weight_quantizer" and layer.per_expert
            shape = (layer.num_gemms, 1, 1) if apart else ()
            quantizer.amax = torch.full(shape, torch.nan, device=device)


def _shared(amax: torch.Tensor, key: str, offsets: Offsets, place: Place) -> ShardedTensor:
    """Describe an amax that is equal on all ranks with experts of the layer; one writes it."""
    if amax.numel() != 1:
        raise QuantError(
            f"{key} {tuple(amax.shape)} belongs to one rank's rows or blocks: to save experts in a "
            "distributed checkpoint, quantize them with a recipe of megatron_quant"
        )
    return _shard(key, amax.view(1), offsets, (place.ep, place.etp, place.edp))


def _shard(
    key: str, amax_1: torch.Tensor, offsets: Offsets, replica: tuple[int, ...]
) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(
        key, amax_1, *offsets, replica_id=replica, prepend_axis_num=len(offsets)
    )


def _per_expert(
    amax_E11: torch.Tensor, key: str, offsets: Offsets, singleton: bool, place: Place
) -> ShardedTensorFactory:
    """Describe one tensor per expert, by global index; loading merges them into the buffer."""
    shape, count = amax_E11.shape, len(amax_E11)

    def build(
        name: str, data: torch.Tensor, replica: Any, flattened_range: Any
    ) -> dict[str, ShardedTensor]:
        assert flattened_range is None, "no optimizer has this tensor"
        built = {}
        for local, amax in enumerate(data.view(count)):
            expert = place.ep * count + local
            if singleton:
                # Megatron names an expert before its linear: experts.5.linear_fc1
                own, at = f"{name.removesuffix(key)}{expert}.{key}", offsets
            else:
                own, at = name, (*offsets, (len(offsets), expert, place.experts))
            built[str(local)] = _shard(own, amax.view(1), at, replica)
        return built

    def merge(loaded: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([loaded[str(i)] for i in range(count)]).view(shape)

    return ShardedTensorFactory(key, amax_E11, build, merge, (0, place.etp, place.edp))
