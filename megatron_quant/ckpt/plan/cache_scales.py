"""List the scales of a quantized KV cache among an export's tensors: scalars of no weight."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_quant.ckpt.dialects import K_SCALE, V_SCALE, Dialect, StorageScheme, refuse_cache
from megatron_quant.models import Parallel, Param, Role, Source
from megatron_quant.recipes import QuantPlan, attention_of, cache_slots

FIELDS = {"k": K_SCALE, "v": V_SCALE}
"""Part of the cache -> the pseudo field that is its scale."""


def cache_tensors(
    quant: QuantPlan, dialect: Dialect, params: Sequence[Param]
) -> Iterator[tuple[Param, Source, StorageScheme]]:
    """Yield the scales that ``dialect`` stores of the KV cache of ``quant``, as parameters.

    They have the names of the cache slots, and the layers of the keys' projections in ``params``.

    Args:
        quant: The resolved recipe.
        dialect: Dialect of the export.
        params: The model's logical parameters.

    Raises:
        FormatError: Where the dialect has no such scales.
    """
    if not quant.kv_cache:
        return
    if not dialect.cache_scales:
        refuse_cache(quant, dialect.name)
    schemes = {stored.field: StorageScheme((stored,)) for stored in dialect.cache_scales}
    layers = {attention_of(quant.by_name[param.name].slot): param.layer for param in params}
    for slot in cache_slots(quant):
        scheme = schemes[FIELDS[slot.part]]
        (stored,) = scheme.stored
        source = Source(f"{slot.attention}.{stored.suffix}", stored.scalar_shape)
        param = Param(
            name=slot.name,
            sources=(source,),
            shape=source.shape,
            role=Role.CACHE,
            parallel=Parallel.REPLICATED,
        )
        yield replace(param, layer=layers[slot.attention]), source, scheme
