"""The keys under which training runs save the parameters that a model's table names.

Layers and experts have a key each, or are stacked along leading dims; gate and up are one tensor,
or ``..._w`` and ``..._v``; parts of a delta net's linear, and of Mamba's, have names of their own.
Read in megatron-core 0.12 to 0.19 (``sharded_state_dict``) and in its ``fsdp_dtensor_checkpoint``;
the saves of 0.16.1 and 0.19.2 were tried.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from megatron_quant.models import Param

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(linear_fc\d)\.(weight|bias)(\d+)")
_LAYERS = "decoder.layers."
_ALIASES = (
    (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
    (".self_attention.in_proj.layer_norm_weight", ".input_layernorm.weight"),
    (".mixer.in_proj.layer_norm_weight", ".norm.weight"),
    (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
    (".self_attention.linear_q_up_proj.layer_norm_weight", ".self_attention.q_layernorm.weight"),
    (".self_attention.linear_kv_up_proj.layer_norm_weight", ".self_attention.kv_layernorm.weight"),
    (".transformer_layer.", ".mtp_model_layer."),
    (".final_norm.", ".final_layernorm."),
)
"""Parts of names in Transformer Engine's layer spec, and in others; of ``mtp`` in newer ones."""
_HALVES = ("_w", "_v")


@dataclass(frozen=True, slots=True)
class Spelling:
    """A name that a parameter may have in a checkpoint.

    lead: the index of its layer and expert in what is stacked; stack: how many of these there are.
    """

    name: str
    lead: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyPlace:
    """Where a parameter is stored, or one of its two sources, or one of its kept items.

    key: of the stored tensor, which has ``shape`` but for vocabulary padding. lead: the parameter's
    index in its leading dims. part: the number of the only source, or item of the parameter's
    order, that it holds; None for all of what Megatron has under this name.
    """

    key: str
    shape: tuple[int, ...]
    lead: tuple[int, ...] = ()
    part: int | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of what a checkpoint may stack: layers and experts of the model."""

    layers: int
    experts: int


def places_of(param: Param, counts: Counts, keys: Container[str]) -> tuple[KeyPlace, ...]:
    """Return where ``param`` lies among ``keys``, without their prefix.

    One place, or one of each half or item; none where no key is known for it.
    """
    halves = _HALVES if len(param.sources) == 2 and not param.groups else ()
    for spelling in _spellings(param, counts):
        name, stack = spelling.name, spelling.stack
        if name in keys:
            rows = param.inside.rows if param.inside else param.shape[0]
            return (KeyPlace(name, (*stack, rows, *param.shape[1:]), spelling.lead),)
        if param.kept and all(f"{name}.{part}" in keys for part in param.kept):
            return tuple(
                KeyPlace(
                    f"{name}.{kept}",
                    (*stack, item.count * param.groups, *param.shape[1:]),
                    spelling.lead,
                    number,
                )
                for number, (kept, item) in enumerate(zip(param.kept, param.order, strict=True))
            )
        if halves and all(name + half in keys for half in halves):
            return tuple(
                KeyPlace(name + half, (*stack, *source.shape), spelling.lead, part)
                for part, (half, source) in enumerate(zip(halves, param.sources, strict=True))
            )
    return ()


def _spellings(param: Param, counts: Counts) -> Iterator[Spelling]:
    for one in _of_expert(param, counts):
        for old, new in (("", ""), *_ALIASES):
            if old not in one.name:
                continue
            name = one.name.replace(old, new, 1) if old else one.name
            yield Spelling(name, one.lead, one.stack)
            if param.layer is not None and name.startswith(_LAYERS):
                rest = name.removeprefix(f"{_LAYERS}{param.layer}.")
                stack = (counts.layers, *one.stack)
                yield Spelling(_LAYERS + rest, (param.layer, *one.lead), stack)


def _of_expert(param: Param, counts: Counts) -> Iterator[Spelling]:
    found = _EXPERT.fullmatch(param.name)
    if found is None or param.expert is None:
        yield Spelling(param.live)
        return
    experts, linear, kind, number = found.groups()
    yield Spelling(f"{experts}.experts.{number}.{linear}.{kind}")
    yield Spelling(f"{experts}.experts.{linear}.{kind}", (param.expert,), (counts.experts,))
    yield Spelling(param.name)
    yield Spelling(f"{experts}.local_experts.{number}.{linear}.{kind}")
