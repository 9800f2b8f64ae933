"""Parameters of the parts that all architectures share, in Megatron's order.

Megatron names are those of GPTModel with the Transformer Engine layer spec, where the norm before
a dense linear is fused into it. Hugging Face names are those of transformers' checkpoints.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_quant.models.decoder import Decoder, Experts, Latent
from megatron_quant.models.delta_net import delta_net
from megatron_quant.models.spec import (
    Domain,
    Parallel,
    Param,
    Role,
    Rows,
    Source,
    Stage,
    replicated,
)


def _linear(name: str, modules: tuple[str, ...], shapes: tuple[tuple[int, int], ...]) -> Param:
    """Describe a column-parallel linear made of ``modules`` of ``shapes`` [N, K]."""
    sources = tuple(Source(f"{m}.weight", s) for m, s in zip(modules, shapes, strict=True))
    shape = (sum(n for n, _ in shapes), shapes[0][1])
    return Param(
        name=name, sources=sources, shape=shape, role=Role.LINEAR, parallel=Parallel.COLUMN
    )


def _row_linear(name: str, module: str, shape: tuple[int, int]) -> Param:
    return replace(_linear(name, (module,), (shape,)), parallel=Parallel.ROW)


def _bias(weight: Param) -> Param:
    """Describe the bias of ``weight``, cut as its rows are."""
    module, _, leaf = weight.name.rpartition(".")
    column = weight.parallel is Parallel.COLUMN
    return replace(
        weight,
        name=f"{module}.{leaf.replace('weight', 'bias')}",
        sources=tuple(Source(f"{s.module}.bias", s.shape[:1]) for s in weight.sources),
        shape=weight.shape[:1],
        role=Role.BIAS,
        parallel=Parallel.COLUMN if column else Parallel.REPLICATED,
    )


def _with_bias(decoder: Decoder, weight: Param) -> Iterator[Param]:
    """Yield ``weight``, and its bias where the model has any."""
    yield weight
    if decoder.biased:
        yield _bias(weight)


def _norm(name: str, module: str, size: int) -> Param:
    return replicated(name, f"{module}.weight", (size,), Role.NORM)


def embedding(decoder: Decoder) -> Param:
    """Describe the token embedding, [vocab, hidden], cut by vocabulary rows."""
    shape = (decoder.vocab, decoder.hidden)
    source = Source("model.embed_tokens.weight", shape)
    name = "embedding.word_embeddings.weight"
    stage = Stage.ENDS if decoder.tied else Stage.FIRST
    return Param(
        name=name,
        sources=(source,),
        shape=shape,
        role=Role.EMBEDDING,
        parallel=Parallel.COLUMN,
        stage=stage,
    )


def attention(decoder: Decoder, layer: int) -> Iterator[Param]:
    """Yield the self-attention of one layer, with the norm before it."""
    ours, theirs = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}"
    q = (decoder.heads * decoder.head_dim, decoder.hidden)
    kv = (decoder.query_groups * decoder.head_dim, decoder.hidden)
    qkv = tuple(f"{theirs}.self_attn.{p}_proj" for p in "qkv")
    if decoder.sinks:
        yield _sinks(f"{ours}.core_attention", f"{theirs}.self_attn", decoder.heads)
    proj = _row_linear(f"{ours}.linear_proj.weight", f"{theirs}.self_attn.o_proj", q[::-1])
    yield from _with_bias(decoder, proj)
    name = f"{ours}.linear_qkv.layer_norm_weight"
    yield _norm(name, f"{theirs}.input_layernorm", decoder.hidden)
    rows = (2 * q[0], q[1]) if decoder.gated else q
    fused = _linear(f"{ours}.linear_qkv.weight", qkv, (rows, kv, kv))
    fused = replace(fused, groups=decoder.query_groups)
    if decoder.gated:
        fused = replace(fused, order=_gated_order(decoder))
    yield from _with_bias(decoder, fused)
    if decoder.qkv_bias:
        yield _bias(fused)
    if decoder.qk_norm:
        for p in "qk":
            name = f"{ours}.{p}_layernorm.weight"
            yield _norm(name, f"{theirs}.self_attn.{p}_norm", decoder.head_dim)


def _gated_order(decoder: Decoder) -> tuple[Rows, ...]:
    """Return a query group's rows: queries of its heads, gates of its heads, key, value."""
    dim, heads = decoder.head_dim, decoder.heads // decoder.query_groups
    stride = 2 * dim * heads
    queries = [Rows(source=0, start=2 * dim * h, count=dim, stride=stride) for h in range(heads)]
    gates = [replace(rows, start=rows.start + dim) for rows in queries]
    last = [Rows(source=source, start=0, count=dim, stride=dim) for source in (1, 2)]
    return (*queries, *gates, *last)


def _sinks(ours: str, theirs: str, heads: int) -> Param:
    source = Source(f"{theirs}.sinks", (heads,))
    name = f"{ours}.softmax_offset"
    return Param(
        name=name, sources=(source,), shape=(heads,), role=Role.OTHER, parallel=Parallel.COLUMN
    )


def latent_attention(decoder: Decoder, latent: Latent, layer: int) -> Iterator[Param]:
    """Yield the latent self-attention of one layer, with its norms.

    It attends through compressed queries, keys and values. Every tensor-parallel rank has the
    compressing linears whole. Engines make one linear of them.
    """
    ours, theirs = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}.self_attn"
    heads, hidden = decoder.heads, decoder.hidden
    name = f"decoder.layers.{layer}.input_layernorm.weight"
    yield _norm(name, f"model.layers.{layer}.input_layernorm", hidden)
    out = (hidden, heads * latent.value)
    yield _row_linear(f"{ours}.linear_proj.weight", f"{theirs}.o_proj", out)
    q = heads * (latent.nope + latent.rope)
    fused = f"{theirs}.fused_qkv_a_proj" if latent.q_rank else ""
    if latent.q_rank:
        down = (latent.q_rank, hidden)
        yield _compressing(f"{ours}.linear_q_down_proj.weight", f"{theirs}.q_a_proj", down, fused)
        up = f"{ours}.linear_q_up_proj"
        yield _norm(f"{up}.layer_norm_weight", f"{theirs}.q_a_layernorm", latent.q_rank)
        yield _linear(f"{up}.weight", (f"{theirs}.q_b_proj",), ((q, latent.q_rank),))
    else:
        yield _linear(f"{ours}.linear_q_proj.weight", (f"{theirs}.q_proj",), ((q, hidden),))
    down = (latent.kv_rank + latent.rope, hidden)
    name = f"{ours}.linear_kv_down_proj.weight"
    yield _compressing(name, f"{theirs}.kv_a_proj_with_mqa", down, fused)
    up = f"{ours}.linear_kv_up_proj"
    yield _norm(f"{up}.layer_norm_weight", f"{theirs}.kv_a_layernorm", latent.kv_rank)
    kv = (heads * (latent.nope + latent.value), latent.kv_rank)
    yield _linear(f"{up}.weight", (f"{theirs}.kv_b_proj",), (kv,))


def _compressing(name: str, module: str, shape: tuple[int, int], fused: str) -> Param:
    param = _linear(name, (module,), (shape,))
    return replace(param, parallel=Parallel.REPLICATED, fused=fused)


def dense_mlp(decoder: Decoder, layer: int) -> Iterator[Param]:
    """Yield the gated MLP of one layer, with the norm before it."""
    ours, theirs = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}"
    fc1 = (decoder.ffn, decoder.hidden)
    gate_up = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
    name = f"{ours}.linear_fc1.layer_norm_weight"
    yield _norm(name, f"{theirs}.post_attention_layernorm", decoder.hidden)
    linear = _linear(f"{ours}.linear_fc1.weight", gate_up, (fc1, fc1))
    yield from _with_bias(decoder, linear)
    down = _row_linear(f"{ours}.linear_fc2.weight", f"{theirs}.mlp.down_proj", fc1[::-1])
    yield from _with_bias(decoder, down)


def moe_mlp(decoder: Decoder, experts: Experts, layer: int) -> Iterator[Param]:
    """Yield router and experts of one layer, with the norm before them (it is not fused)."""
    ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
    name = f"{ours}.pre_mlp_layernorm.weight"
    yield _norm(name, f"{theirs}.post_attention_layernorm", decoder.hidden)
    router = (experts.count, decoder.hidden)
    source = f"{theirs}.{experts.names.router}.weight"
    param = replicated(f"{ours}.mlp.router.weight", source, router, Role.ROUTER)
    yield from _with_bias(decoder, param)
    if experts.names.bias:
        name, source = f"{ours}.mlp.router.expert_bias", f"{theirs}.{experts.names.bias}"
        yield replace(replicated(name, source, (experts.count,), Role.ROUTER), fp32=True)
    fc1 = (experts.ffn, decoder.hidden)
    for expert in range(experts.count):
        name = f"{ours}.mlp.experts.linear_fc1.weight{expert}"
        gate_up = (experts.names.gate, experts.names.up)
        modules = tuple(f"{theirs}.{m.format(expert=expert)}" for m in gate_up)
        linear = _of_expert(_linear(name, modules, (fc1, fc1)), expert)
        yield from _with_bias(decoder, linear)
    for expert in range(experts.count):
        name = f"{ours}.mlp.experts.linear_fc2.weight{expert}"
        module = f"{theirs}.{experts.names.down.format(expert=expert)}"
        linear = _of_expert(_row_linear(name, module, fc1[::-1]), expert)
        yield from _with_bias(decoder, linear)
    if experts.shared_ffn:
        yield from _shared_expert(decoder, experts, layer)


def _shared_expert(decoder: Decoder, experts: Experts, layer: int) -> Iterator[Param]:
    """Yield the expert that every token visits: an MLP, cut as dense ones are."""
    ours, theirs = f"decoder.layers.{layer}.mlp.shared_experts", f"model.layers.{layer}"
    if experts.names.shared_gate:
        source = f"{theirs}.{experts.names.shared_gate}.weight"
        yield replicated(f"{ours}.gate_weight", source, (1, decoder.hidden), Role.ROUTER)
    fc1, mlp = (experts.shared_ffn, decoder.hidden), f"{theirs}.{experts.names.shared}"
    gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    yield _linear(f"{ours}.linear_fc1.weight", gate_up, (fc1, fc1))
    yield _row_linear(f"{ours}.linear_fc2.weight", f"{mlp}.down_proj", fc1[::-1])


def _of_expert(param: Param, expert: int) -> Param:
    return replace(param, domain=Domain.EXPERT, expert=expert)


def head(decoder: Decoder) -> Iterator[Param]:
    """Yield the last norm, and the output layer [vocab, hidden] unless it is the embedding."""
    norm = _norm("decoder.final_layernorm.weight", "model.norm", decoder.hidden)
    yield replace(norm, stage=Stage.LAST)
    if not decoder.tied:
        shape = (decoder.vocab, decoder.hidden)
        sources = (Source("lm_head.weight", shape),)
        output = Param(
            name="output_layer.weight",
            sources=sources,
            shape=shape,
            role=Role.OUTPUT,
            parallel=Parallel.COLUMN,
        )
        yield replace(output, stage=Stage.LAST)


def of_layer(decoder: Decoder, layer: int, *, experts: bool) -> Iterator[Param]:
    """Yield every parameter of one layer; ``experts`` says whether it has any."""
    if decoder.delta is not None and decoder.has_delta_net(layer):
        yield from delta_net(decoder, decoder.delta, layer)
    elif decoder.latent is not None:
        yield from latent_attention(decoder, decoder.latent, layer)
    else:
        yield from attention(decoder, layer)
    if experts and decoder.experts is not None:
        yield from moe_mlp(decoder, decoder.experts, layer)
    else:
        yield from dense_mlp(decoder, layer)


def parameters(decoder: Decoder) -> Iterator[Param]:
    """Yield every parameter of the model, in Megatron's order."""
    yield embedding(decoder)
    for layer in range(decoder.layers):
        for param in of_layer(decoder, layer, experts=decoder.has_experts(layer)):
            yield replace(param, layer=layer)
    yield from head(decoder)
