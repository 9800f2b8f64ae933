"""Parameters of the layers that predict tokens ahead, which Megatron calls ``mtp``."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_quant.models.blocks import embedding, head, of_layer
from megatron_quant.models.decoder import Decoder
from megatron_quant.models.spec import Parallel, Param, Role, Source, Stage


@dataclass(frozen=True, kw_only=True)
class DraftNames:
    """Hugging Face modules of the layers for speculation.

    ``{number}`` stands for a layer's number, from 0 on, and ``{layer}`` for the one that counts on
    from the model's last.

    Attributes:
        layer: What its attention and experts are named under.
        embedding_norm: Norm of the next token's embedding.
        hidden_norm: Norm of the hidden states.
        projection: Linear of both, one after the other, in this order.
        norm: Norm before the output layer.
        embedding: Copy of the model's embedding; empty for none.
        head: Copy of the model's output layer; empty for none.
        most: Layers that the names can tell apart; None for any number.
    """

    layer: str
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str
    embedding: str = ""
    head: str = ""
    most: int | None = None


NUMBERED = DraftNames(
    layer="model.layers.{layer}",
    embedding_norm="model.layers.{layer}.enorm",
    hidden_norm="model.layers.{layer}.hnorm",
    projection="model.layers.{layer}.eh_proj",
    norm="model.layers.{layer}.shared_head.norm",
    embedding="model.layers.{layer}.embed_tokens",
    head="model.layers.{layer}.shared_head.head",
)
"""Names of DeepSeek-V3, and of GLM-4.5 to 4.7."""
APART = DraftNames(
    layer="mtp.layers.{number}",
    embedding_norm="mtp.pre_fc_norm_embedding",
    hidden_norm="mtp.pre_fc_norm_hidden",
    projection="mtp.fc",
    norm="mtp.norm",
    most=1,
)
"""Names of Qwen3-Next and Qwen3.5."""


def drafts(decoder: Decoder, names: DraftNames, count: int) -> Iterator[Param]:
    """Yield the parameters of ``count`` layers, without copies of the model's own."""
    assert names.most is None or count <= names.most, count
    for number in range(count):
        yield from _of_draft(decoder, names, number)


def _of_draft(decoder: Decoder, names: DraftNames, number: int) -> Iterator[Param]:
    ours, hidden = f"mtp.layers.{number}", decoder.hidden
    at = {"number": number, "layer": decoder.layers + number}
    for leaf, theirs in (
        ("enorm", names.embedding_norm),
        ("hnorm", names.hidden_norm),
        ("final_layernorm", names.norm),
    ):
        source = Source(f"{theirs.format(**at)}.weight", (hidden,))
        yield _param(f"{ours}.{leaf}.weight", source, Parallel.REPLICATED)
    # engines build it plain, so no rule quantizes it
    source = Source(f"{names.projection.format(**at)}.weight", (hidden, 2 * hidden))
    yield _param(f"{ours}.eh_proj.weight", source, Parallel.COLUMN)
    # its attention is full attention, whatever the model's layers have
    decoder, layer = replace(decoder, delta=None), decoder.layers
    old, new = f"model.layers.{layer}.", f"{names.layer.format(**at)}."
    for param in of_layer(decoder, layer, experts=decoder.experts is not None):
        inner = param.name.removeprefix(f"decoder.layers.{layer}.")
        sources = (replace(s, name=new + s.name.removeprefix(old)) for s in param.sources)
        yield replace(
            param,
            name=f"{ours}.transformer_layer.{inner}",
            sources=tuple(sources),
            role=Role.DRAFT_LINEAR if param.role is Role.LINEAR else Role.DRAFT,
            stage=Stage.LAST,
            fused=new + param.fused.removeprefix(old) if param.fused else "",
        )


def _param(name: str, source: Source, parallel: Parallel) -> Param:
    return Param(
        name=name,
        sources=(source,),
        shape=source.shape,
        role=Role.DRAFT,
        parallel=parallel,
        stage=Stage.LAST,
    )


def copies_in_drafts(decoder: Decoder, names: DraftNames, count: int) -> Iterator[Param]:
    """Yield what files store with each layer, and a live model holds once."""
    table = embedding(decoder)
    output = next((p for p in head(decoder) if p.role is Role.OUTPUT), table)
    for number in range(count):
        at = {"number": number, "layer": decoder.layers + number}
        for module, own in ((names.embedding, table), (names.head, output)):
            if module:
                source = Source(f"{module.format(**at)}.weight", own.shape)
                yield replace(
                    own,
                    name=f"mtp.layers.{number}.{own.name}",
                    sources=(source,),
                    role=Role.EMBEDDING,  # no rule takes it for the output layer
                    stage=Stage.LAST,
                    copy_of=own.name,
                )
