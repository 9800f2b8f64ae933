"""Parameters of a gated delta net, Megatron-Core's ``GatedDeltaNet``.

Megatron has one linear for q, k, v, z, b and a, in this order, each of all heads of a rank.
Checkpoints have two or four. Engines build that of b and a unquantized.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_quant.models.decoder import Decoder, DeltaNet
from megatron_quant.models.spec import Inside, Parallel, Param, Role, Rows, Source, replicated

_LARGE, _GATES = ("query", "key", "value", "z"), ("beta", "alpha")
"""What GatedDeltaNet.sharded_state_dict calls the parts of in_proj."""


def delta_net(decoder: Decoder, net: DeltaNet, layer: int) -> Iterator[Param]:
    """Yield the gated delta net of one layer, with the norm before it."""
    ours = f"decoder.layers.{layer}.self_attention"
    block = f"model.layers.{layer}"
    theirs = f"{block}.linear_attn"
    heads = (net.value_heads,)
    yield _cut(f"{ours}.dt_bias", Source(f"{theirs}.dt_bias", heads))
    yield _cut(f"{ours}.A_log", Source(f"{theirs}.A_log", heads))
    yield _norm(
        f"{ours}.in_proj.layer_norm_weight",
        Source(f"{block}.input_layernorm.weight", (decoder.hidden,)),
    )
    yield from _in_proj(decoder, net, ours, theirs)
    yield _convolution(net, ours, theirs)
    own = _norm(f"{ours}.out_norm.weight", Source(f"{theirs}.norm.weight", (net.value_dim,)))
    # this norm alone has its weight stored as it is, in a model whose others are stored less one
    yield replace(own, shift=-1.0 if decoder.centered else 0.0, wide=True)
    out = (decoder.hidden, net.value_heads * net.value_dim)
    yield Param(
        name=f"{ours}.out_proj.weight",
        sources=(Source(f"{theirs}.out_proj.weight", out),),
        shape=out,
        role=Role.LINEAR,
        parallel=Parallel.ROW,
    )


def _cut(name: str, source: Source) -> Param:
    """Describe a number for each head, which Megatron computes with in float32."""
    return Param(
        name=name,
        sources=(source,),
        shape=source.shape,
        role=Role.OTHER,
        parallel=Parallel.COLUMN,
        wide=True,
    )


def _norm(name: str, source: Source) -> Param:
    return replicated(name, source.name, source.shape, Role.NORM)


def _items(net: DeltaNet) -> tuple[int, int, int, int]:
    """Return the rows of q, k, v and z that belong to one key head."""
    values = net.value_heads // net.key_heads * net.value_dim
    return net.key_dim, net.key_dim, values, values


def _follow(source: int, counts: tuple[int, ...], groups: int, *, grouped: bool) -> list[Rows]:
    """Return items of one source, whose groups hold all of them or which follow one another."""
    found, at = [], 0
    for count in counts:
        stride = sum(counts) if grouped else count
        found.append(Rows(source=source, start=at, count=count, stride=stride))
        at += count if grouped else count * groups
    return found


def _in_proj(decoder: Decoder, net: DeltaNet, ours: str, theirs: str) -> Iterator[Param]:
    each, groups = _items(net), net.key_heads
    per_head = (net.value_heads // groups,) * 2
    wide, small = sum(each) * groups, 2 * net.value_heads
    large: list[tuple[str, tuple[int, ...]]]
    little: list[tuple[str, tuple[int, ...]]]
    if net.grouped:
        large = [("in_proj_qkvz", each)]
        little = [("in_proj_ba", per_head)]
    else:
        large = [("in_proj_qkv", each[:3]), ("in_proj_z", each[3:])]
        little = [("in_proj_b", per_head[:1]), ("in_proj_a", per_head[1:])]
    name = f"{ours}.in_proj.weight"
    for linears, own, before, role, kept in (
        (large, name, 0, Role.LINEAR, _LARGE),
        (little, f"{ours}.in_proj_gates.weight", wide, Role.OTHER, _GATES),
    ):
        rows = wide if role is Role.LINEAR else small
        order = [
            item
            for number, (_, counts) in enumerate(linears)
            for item in _follow(number, counts, groups, grouped=net.grouped)
        ]
        yield Param(
            name=own,
            sources=tuple(
                Source(f"{theirs}.{leaf}.weight", (sum(counts) * groups, decoder.hidden))
                for leaf, counts in linears
            ),
            shape=(rows, decoder.hidden),
            role=role,
            parallel=Parallel.COLUMN,
            groups=groups,
            order=tuple(order),
            by_item=True,
            kept=kept,
            inside=Inside(name=name, before=before, rows=wide + small),
        )


def _convolution(net: DeltaNet, ours: str, theirs: str) -> Param:
    """Describe the convolution over q, k and v [rows, 1, kernel], in one order everywhere."""
    each = _items(net)[:3]
    shape = (sum(each) * net.key_heads, 1, net.kernel)
    return Param(
        name=f"{ours}.conv1d.weight",
        sources=(Source(f"{theirs}.conv1d.weight", shape),),
        shape=shape,
        role=Role.OTHER,
        parallel=Parallel.COLUMN,
        groups=net.key_heads,
        order=tuple(_follow(0, each, net.key_heads, grouped=False)),
        by_item=True,
        kept=_LARGE[:3],
    )
