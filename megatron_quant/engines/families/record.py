"""The record of a family. One file holds one family; `registry` lists the files."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Tensors of a layer that engines build without quantization. No recipe quantizes them.

    Engines load such tensors by the names of plain ones. Codes there raise an error. If only the
    dtype differs, they load silently as wrong values.

    Attributes:
        names: Pattern of the tensors' names in their layer.
        source: Where an engine says so.
        router: Whether it is a router's, or another gate of experts.
    """

    names: str
    source: str
    router: bool = False


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Linears of one module that engines fuse into one. They share format and tensor scales.

    Attributes:
        name: The engines' name of the fused one.
        members: Last name parts of the linears that it fuses; a module may lack some.
        marks: Members that tell this one from others with the same members.
        whole_reason: Why vLLM loads no scale of a whole member; empty where it does.
    """

    name: str
    members: tuple[str, ...]
    marks: tuple[str, ...] = ()
    whole_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Called:
    """Modules that an engine builds under another prefix than the checkpoint's.

    Exclusions and formats that a config states by name then name both.

    Attributes:
        modules: Pattern of the checkpoint's names.
        engine: The engine's name, with groups of the pattern as ``\\1``. In layers for speculation
            ``{layer}`` is the number that the engine gives to the first of them.
        source: Where an engine says so.
        drafts: Whether it holds in layers for speculation alone.
        numbered: Numbers that the engine uses up for each layer of the model.
    """

    modules: str
    engine: str
    source: str
    drafts: bool = False
    numbered: int = 1


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stored 3-D tensor with a matrix for each expert, under an unusual name.

    Attributes:
        names: Pattern of the tensor's name. Its first group is the block that has the experts.
        holds: ``gate_up_proj`` or one of ``gate_proj``, ``up_proj``, ``down_proj``.
    """

    names: str
    holds: str


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A linear whose rows are those of several to engines: no block of scales may join them.

    Attributes:
        modules: Pattern of its name.
        parts: Keys of config.json, whose product is the number of rows of a part.
        source: Where an engine says so.
    """

    modules: str
    parts: tuple[tuple[str, ...], ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class RunAs:
    """The class of transformers that runs a model whose ``model_type`` it does not build.

    Attributes:
        of: ``model_type`` in config.json.
        kind: ``model_type`` of the class.
        tower: ``vision_config`` of that class, as small as it can be, where config.json is its
            ``text_config``; None where it is the whole config.
    """

    of: str
    kind: str
    tower: Mapping[str, int] | None = None


class Layout(Enum):
    """How the stacks of a family lie."""

    PLAIN = "[E, 2I, H] and [E, H, I], gate first"
    TRANSPOSED = "[E, H, 2I] and [E, I, H], gate first"
    ALTERNATING = "[E, H, 2I] and [E, I, H], gate and up in turn"
    EITHER = "plain as transformers saves it, transposed on the hub: shapes tell"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts of one family that differ from those of most.

    Attributes:
        title: What people call its models.
        classes: Entries of ``architectures`` in config.json.
        kinds: ``model_type`` in config.json, or in its config of the text decoder.
        embedding: Module of the embedding in the decoder.
        head: Module of the output layer.
        layers: Keys of config.json that count the decoder's layers, or list them.
        gated: Whether an expert has a gate: gate, up and down; otherwise up and down alone.
        dense: What engines keep unquantized.
        plain_router: Whether engines build its router plain, whatever a config says.
        dense_key: Key of config.json that lists modules of a layer which engines then keep so.
        fused: What engines fuse, besides the usual.
        called: What engines call otherwise.
        stacks: Stacks of experts with names of their own.
        layout: How stacks lie.
        stacked: Whether engines load the routed experts of a layer as stacks alone.
        head_reason: Why engines load no quantized output layer; empty where they do.
        nameless_head: Why vLLM quantizes the output layer of a ModelOpt export that excludes it;
            empty where it does not.
        plain_drafts: Dialects in which vLLM builds every layer for speculation plain if the export
            excludes any linear of them.
        merged: Linears of several parts.
        vllm_reason: Why vLLM loads no export of the family; empty where it does.
        loaded: (pattern, replacement) that turn transformers' names in a layer into the
            checkpoint's, one after another.
        runs_as: What transformers runs as another of its models.
        idle_key: Key of config.json that counts experts without weights. transformers has places
            for their gate and up.
    """

    title: str
    classes: tuple[str, ...]
    kinds: tuple[str, ...]
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    layers: tuple[str, ...] = ("num_hidden_layers",)
    gated: bool = True
    dense: tuple[Dense, ...] = ()
    plain_router: bool = True
    dense_key: str = ""
    fused: tuple[Fused, ...] = ()
    called: tuple[Called, ...] = ()
    stacks: tuple[Stack, ...] = ()
    layout: Layout = Layout.PLAIN
    stacked: bool = False
    head_reason: str = ""
    nameless_head: str = ""
    plain_drafts: tuple[str, ...] = ()
    merged: tuple[Merged, ...] = ()
    vllm_reason: str = ""
    loaded: tuple[tuple[str, str], ...] = ()
    runs_as: tuple[RunAs, ...] = ()
    idle_key: str = ""
