"""Parameters of a hybrid model: one mixer a layer, which is Mamba, attention, an MLP or experts.

Megatron names are those of Megatron-Core's ``MambaModel`` with its Transformer Engine layer spec,
read in megatron-core 0.16.1 and 0.19.2. No linear has a bias, and no MLP a gate.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_quant.models.blocks import attention, embedding, head
from megatron_quant.models.decoder import ATTENTION, MAMBA, MLP, MOE, Decoder, Experts, Hybrid
from megatron_quant.models.spec import Domain, Parallel, Param, Role, Rows, replicated


def hybrid_parameters(decoder: Decoder, hybrid: Hybrid) -> Iterator[Param]:
    """Yield every parameter of the model, in Megatron's order."""
    yield _called(embedding(decoder), "backbone.embeddings.weight")
    for layer, kind in enumerate(hybrid.kinds):
        for param in _of_layer(decoder, hybrid, layer, kind):
            yield replace(param, layer=layer)
    for param in head(decoder):
        if param.role is Role.NORM:
            norm = _called(param, "backbone.norm_f.weight")
            yield replace(norm, name="decoder.final_norm.weight")
        else:
            yield param


def _called(param: Param, name: str) -> Param:
    (source,) = param.sources
    return replace(param, sources=(replace(source, name=name),))


def _of_layer(decoder: Decoder, hybrid: Hybrid, layer: int, kind: str) -> Iterator[Param]:
    if kind == MAMBA:
        yield from _mamba(decoder, hybrid, layer)
    elif kind == ATTENTION:
        yield from _attention(decoder, layer)
    elif kind == MLP:
        ours, theirs = _names(layer, "mlp")
        yield _norm(decoder, f"{ours}.linear_fc1.layer_norm_weight", layer)
        yield from _ungated(ours, f"{theirs}.mixer", decoder.ffn, decoder.hidden)
    else:
        assert kind == MOE and decoder.experts is not None, kind
        yield from _experts(decoder, decoder.experts, hybrid.latent, layer)


def _names(layer: int, part: str) -> tuple[str, str]:
    """Return what a layer's part is called in Megatron, and the layer in the checkpoint."""
    return f"decoder.layers.{layer}.{part}", f"backbone.layers.{layer}"


def _attention(decoder: Decoder, layer: int) -> Iterator[Param]:
    """Yield the attention that other decoders have, by this family's names."""
    _, theirs = _names(layer, "self_attention")
    for param in attention(decoder, layer):
        if param.role is Role.NORM:
            yield _called(param, f"{theirs}.norm.weight")
            continue
        leaves = (s.name.partition(".self_attn.")[2] for s in param.sources)
        own = zip(param.sources, leaves, strict=True)
        yield replace(
            param, sources=tuple(replace(s, name=f"{theirs}.mixer.{leaf}") for s, leaf in own)
        )


def _norm(decoder: Decoder, name: str, layer: int) -> Param:
    _, theirs = _names(layer, "")
    return replicated(name, f"{theirs}.norm.weight", (decoder.hidden,), Role.NORM)


def _linear(name: str, module: str, shape: tuple[int, int], parallel: Parallel) -> Param:
    return replace(replicated(name, f"{module}.weight", shape, Role.LINEAR), parallel=parallel)


def _ungated(ours: str, theirs: str, ffn: int, hidden: int) -> Iterator[Param]:
    """Yield up and down of an MLP without a gate."""
    up = f"{theirs}.up_proj"
    yield _linear(f"{ours}.linear_fc1.weight", up, (ffn, hidden), Parallel.COLUMN)
    down = f"{theirs}.down_proj"
    yield _linear(f"{ours}.linear_fc2.weight", down, (hidden, ffn), Parallel.ROW)


def _experts(decoder: Decoder, experts: Experts, latent: int, layer: int) -> Iterator[Param]:
    """Yield router, experts and the linears around them, with the norm before (not fused)."""
    (ours, theirs), names = _names(layer, "mlp"), experts.names
    mixer = f"{theirs}.mixer"
    yield _norm(decoder, f"decoder.layers.{layer}.pre_mlp_layernorm.weight", layer)
    router = (experts.count, decoder.hidden)
    gate = f"{theirs}.{names.router}.weight"
    yield replicated(f"{ours}.router.weight", gate, router, Role.ROUTER)
    bias = replicated(
        f"{ours}.router.expert_bias", f"{theirs}.{names.bias}", router[:1], Role.ROUTER
    )
    yield replace(bias, fp32=True)
    width = latent or decoder.hidden
    if latent:
        for leaf, shape in (
            ("fc1_latent_proj", (width, decoder.hidden)),
            ("fc2_latent_proj", (decoder.hidden, width)),
        ):
            # engines may quantize these two, and every published recipe leaves them
            yield replicated(f"{ours}.{leaf}.weight", f"{mixer}.{leaf}.weight", shape, Role.OTHER)
    for linear, module, shape, parallel in (
        ("linear_fc1", names.up, (experts.ffn, width), Parallel.COLUMN),
        ("linear_fc2", names.down, (width, experts.ffn), Parallel.ROW),
    ):
        for expert in range(experts.count):
            name = f"{ours}.experts.{linear}.weight{expert}"
            own = _linear(name, f"{theirs}.{module.format(expert=expert)}", shape, parallel)
            yield replace(own, domain=Domain.EXPERT, expert=expert)
    if experts.shared_ffn:
        shared = f"{theirs}.{names.shared}"
        yield from _ungated(f"{ours}.shared_experts", shared, experts.shared_ffn, decoder.hidden)


def _mamba(decoder: Decoder, hybrid: Hybrid, layer: int) -> Iterator[Param]:
    """Yield a Mamba-2 mixer, with the norm before it.

    Megatron has the rows of in_proj and of the convolution in the checkpoint's order, each part of
    all groups of a rank. Its checkpoints keep every part by itself.
    """
    ours, block = _names(layer, "mixer")
    theirs, heads = f"{block}.mixer", hybrid.heads
    inner = heads * hybrid.head_dim
    for leaf, wide in (("dt_bias", False), ("A_log", True), ("D", True)):
        role = Role.BIAS if leaf == "dt_bias" else Role.OTHER
        each = replicated(f"{ours}.{leaf}", f"{theirs}.{leaf}", (heads,), role)
        yield replace(each, parallel=Parallel.COLUMN, wide=wide)
    per_group = (inner // hybrid.groups, hybrid.state, heads // hybrid.groups)
    x, state, step = per_group
    yield _norm(decoder, f"{ours}.in_proj.layer_norm_weight", layer)
    in_proj = replicated(
        f"{ours}.in_proj.weight",
        f"{theirs}.in_proj.weight",
        (hybrid.groups * (2 * x + 2 * state + step), decoder.hidden),
        Role.LINEAR,
    )
    yield _in_parts(hybrid, in_proj, (x, x, state, state, step), ("z", "x", "B", "C", "dt"))
    rows = hybrid.groups * (x + 2 * state)
    for leaf, shape, role in (
        ("weight", (rows, 1, hybrid.kernel), Role.OTHER),
        ("bias", (rows,), Role.BIAS),
    ):
        if leaf == "weight" or hybrid.conv_bias:
            name = f"conv1d.{leaf}"
            convolution = replicated(f"{ours}.{name}", f"{theirs}.{name}", shape, role)
            yield _in_parts(hybrid, convolution, (x, state, state), ("x", "B", "C"))
    norm = replicated(f"{ours}.norm.weight", f"{theirs}.norm.weight", (inner,), Role.NORM)
    yield replace(norm, parallel=Parallel.COLUMN)
    out = (decoder.hidden, inner)
    yield _linear(f"{ours}.out_proj.weight", f"{theirs}.out_proj", out, Parallel.ROW)


def _in_parts(
    hybrid: Hybrid, param: Param, counts: tuple[int, ...], names: tuple[str, ...]
) -> Param:
    """Return ``param`` cut by groups, which have ``counts`` rows of each of its parts."""
    order, at = [], 0
    for count in counts:
        order.append(Rows(source=0, start=at, count=count, stride=count))
        at += count * hybrid.groups
    return replace(
        param,
        parallel=Parallel.COLUMN,
        groups=hybrid.groups,
        order=tuple(order),
        by_item=True,
        kept=names,
    )
