"""Find the faults of a checkpoint's tensors by its own config."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf

import torch

from megatron_quant.ckpt.dialects import INPUT_SCALE, SHAPE, WEIGHT_SCALE, Stored
from megatron_quant.ckpt.plan import slots
from megatron_quant.ckpt.read import (
    COLUMN_SCALE,
    GROUP_INDEX,
    PLAIN_DTYPES,
    QuantizedCheckpoint,
    ReadOnce,
    is_e8m0,
    nan_of_e8m0,
    plain_dtypes,
)
from megatron_quant.errors import CheckpointError
from megatron_quant.formats import Format
from megatron_quant.models import Param, Role, Source, has_plain_router
from megatron_quant.native import library
from megatron_quant.recipes import attention_of

SHARED = ("tensor_scale", INPUT_SCALE, WEIGHT_SCALE)
"""Fields that the members of a fused group must share: engines take one member's for all."""


_ELEMENTS = 1 << 24
"""Elements of a tensor that are looked at together."""


def is_quantized(checkpoint: QuantizedCheckpoint, source: Source) -> bool:
    """Return whether the checkpoint's config quantizes ``source``."""
    return source.module in checkpoint.modules and source.name.endswith(".weight")


def _present(checkpoint: QuantizedCheckpoint, source: Source) -> Iterator[tuple[str, Stored]]:
    """Yield each tensor that stores a quantized ``source``, by name.

    Optional ones if they exist.
    """
    for stored in checkpoint.stored(source.module):
        name = f"{source.module}.{stored.suffix}"
        if not stored.optional or name in checkpoint.tensors:
            yield name, stored


def _orders(checkpoint: QuantizedCheckpoint, source: Source) -> Iterator[str]:
    """Yield names of the tensors with each column's group, where the config says there are any."""
    if not checkpoint.is_ordered:
        names = (f"{source.module}.{suffix}" for suffix in GROUP_INDEX)
        yield from (name for name in names if name in checkpoint.tensors)


def _expected(
    checkpoint: QuantizedCheckpoint, source: Source
) -> Iterator[tuple[str, Stored | None, tuple[torch.dtype, ...], tuple[int, ...]]]:
    """Yield name, meaning, possible dtypes and shape of each tensor that stores ``source``.

    The meaning is None for one that is not quantized.
    """
    if not is_quantized(checkpoint, source):
        yield source.name, None, plain_dtypes(source.name), source.shape
        return
    rows, cols = source.shape
    for name, stored in _present(checkpoint, source):
        yield name, stored, (stored.dtype, *stored.also), stored.shape(rows, cols)


def stray_problems(
    checkpoint: QuantizedCheckpoint, params: tuple[Param, ...], cache: Mapping[str, Stored]
) -> list[str]:
    """Name tensors that neither the model nor its quantization has.

    Args:
        checkpoint: The checkpoint.
        params: The model's logical parameters.
        cache: Result of :func:`stored_cache_tensors`.
    """
    expected = set(cache)
    for source in (s for p in params for s in p.sources):
        if is_quantized(checkpoint, source):
            expected |= {name for name, _ in _present(checkpoint, source)}
            expected.update(_orders(checkpoint, source))
            expected.add(f"{source.module}.{COLUMN_SCALE}")
        else:
            expected.add(source.name)
    return [
        f"{name}: config.json knows no such tensor (its module is not quantized, or not in the "
        "model)"
        for name in checkpoint.tensors
        if name not in expected and not _stands_for_weight(checkpoint, name)
    ]


def _stands_for_weight(checkpoint: QuantizedCheckpoint, name: str) -> bool:
    """Return whether a plain weight takes the place of quantized tensors (reported as that)."""
    module, _, leaf = name.rpartition(".")
    return module in checkpoint.modules and leaf == "weight"


def form_problems(checkpoint: QuantizedCheckpoint, source: Source) -> list[str]:
    """Report tensors that are missing, or whose dtype or shape the config contradicts."""
    info = checkpoint.tensors.get(source.name)
    if is_quantized(checkpoint, source) and info and info.dtype in PLAIN_DTYPES:
        return [f"{source.name}: neither quantized nor in the ignore list of config.json"]
    problems = []
    for name, stored, dtypes, shape in _expected(checkpoint, source):
        info = checkpoint.tensors.get(name)
        if info is None:
            problems.append(f"{name}: missing")
        elif stored and stored.fits(info.dtype, info.shape, (source.shape[0], source.shape[1])):
            continue
        elif info.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            problems.append(f"{name}: dtype is {info.dtype}, config.json means {wanted}")
        elif info.shape != shape:
            problems.append(f"{name}: shape is {info.shape}, config.json means {shape}")
    return problems


def role_problems(checkpoint: QuantizedCheckpoint, source: Source, role: Role) -> list[str]:
    """Report a quantized router if engines build it plain."""
    if role is not Role.ROUTER or not is_quantized(checkpoint, source):
        return []
    if has_plain_router(checkpoint.config):
        return [
            f"{source.name}: quantized, though it is a router, which engines build as a plain one"
        ]
    return []


def element_problems(checkpoint: QuantizedCheckpoint, source: Source, held: ReadOnce) -> list[str]:
    """Report elements that are not finite."""
    if not is_quantized(checkpoint, source):
        return []
    name = f"{source.module}.{checkpoint.stored(source.module)[0].suffix}"
    if not checkpoint.tensors[name].dtype.is_floating_point:
        return []
    return _finite_problems(name, held.raw(name))


def scale_problems(checkpoint: QuantizedCheckpoint, source: Source, held: ReadOnce) -> list[str]:
    """Report scales that are not finite or not positive, and a wrong shape."""
    if not is_quantized(checkpoint, source):
        return []
    elements, orders = checkpoint.stored(source.module)[0], set(_orders(checkpoint, source))
    problems = _order_problems(checkpoint, source, held) if orders else []
    for name, stored in _present(checkpoint, source):
        if name in orders:
            continue
        if stored.field == SHAPE:
            meant, found = stored.constant(*source.shape), held.raw(name)
            if not torch.equal(found.to(meant.dtype), meant):
                problems.append(f"{name}: does not fit the shape {list(source.shape)}")
        elif stored is not elements:
            fmt = checkpoint.modules[source.module].weights
            scale = held.raw(name)
            if stored.signed and scale.is_floating_point():
                scale = scale.abs()
            problems += _scale_problems(name, scale, fmt, stored.field)
    return problems


def _order_problems(checkpoint: QuantizedCheckpoint, source: Source, held: ReadOnce) -> list[str]:
    """Report columns of groups that the weight does not have."""
    try:
        _ = checkpoint.packed(source.module, held).group_of_column
    except CheckpointError as error:
        return [str(error)]
    return []


def _finite_problems(name: str, tensor: torch.Tensor) -> list[str]:
    if tensor.is_floating_point() and not all(map(_is_finite, tensor.view(-1).split(_ELEMENTS))):
        return [f"{name}: holds NaN or infinity"]
    return []


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.dtype == torch.float8_e4m3fn:  # it has no infinity; all ones but the sign is NaN
        codes = (tensor.view(torch.int8), tensor.view(torch.uint8))
        return all(bool(c.max() < torch.iinfo(c.dtype).max) for c in codes)
    return bool(tensor.float().isfinite().all())


def _scale_problems(
    name: str, tensor: torch.Tensor, fmt: Format | None = None, field: str = ""
) -> list[str]:
    if is_e8m0(tensor, fmt, field):
        fault = nan_of_e8m0(name, tensor)
        return [fault] if fault else []
    if _is_sound(tensor):
        return []
    problems = _finite_problems(name, tensor)
    if not problems and tensor.is_floating_point() and not (tensor.float() > 0).all():
        problems.append(f"{name}: holds a scale that is not positive")
    return problems


def _is_sound(scale: torch.Tensor) -> bool:
    """Return whether all numbers are finite and above zero; False where one look does not tell."""
    if scale.numel() == 0:
        return False
    if scale.dtype == torch.float8_e4m3fn:  # positive codes are 1 to 126
        low, high = torch.aminmax(scale.view(torch.uint8))
        return bool(low.item() > 0 and high.item() < 127)
    if scale.dtype not in PLAIN_DTYPES:
        return False
    low, high = torch.aminmax(scale)
    return bool(low.item() > 0 and high.item() < inf)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return ``torch.equal`` once ``b`` has the dtype of ``a``: NaN equals nothing, 0 equals -0."""
    return library.same(a, b) or torch.equal(a, b.to(a.dtype))


def stored_cache_tensors(
    checkpoint: QuantizedCheckpoint, params: tuple[Param, ...]
) -> dict[str, Stored]:
    """Map name to scale of the KV cache, for every attention that makes keys."""
    attentions = [a for slot in slots(params) if (a := attention_of(slot))]
    return {f"{a}.{s.suffix}": s for a in attentions for s in checkpoint.cache_scales}


def cache_problems(checkpoint: QuantizedCheckpoint, cache: Mapping[str, Stored]) -> list[str]:
    """Report scales of ``cache`` that are missing, malformed, not finite or not positive."""
    problems = []
    for name, stored in cache.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            problems.append(f"{name}: missing, though config.json means an FP8 KV cache")
        elif (info.dtype, info.shape) != (stored.dtype, stored.scalar_shape):
            problems.append(
                f"{name}: is {info.dtype} {list(info.shape)}, not {stored.dtype} "
                f"{list(stored.scalar_shape)}"
            )
        else:
            problems += _scale_problems(name, checkpoint.raw(name))
    return problems


def fusion_problems(checkpoint: QuantizedCheckpoint, fused: Sequence[Source]) -> list[str]:
    """Report a fused group that is only partly quantized, or whose scales differ."""
    members = [s.module for s in fused if is_quantized(checkpoint, s)]
    if not members or len(fused) == 1:
        return []
    if len(members) < len(fused):
        rest = [s.module for s in fused if s.module not in members]
        return [f"{members[0]}: quantized, but {rest[0]}, which engines fuse with it, is not"]
    if len({checkpoint.modules[m] for m in members}) > 1:
        return [f"{members[0]}: its format is not that of {members[1]}, fused with it"]
    shared = [s.suffix for s in checkpoint.stored(members[0]) if s.field in SHARED]
    return [
        f"{members[0]}.{suffix}: not equal to that of {', '.join(members[1:])}, "
        "though engines use one scale for all"
        for suffix in shared
        if len({checkpoint.raw(f"{m}.{suffix}").item() for m in members}) > 1
    ]
