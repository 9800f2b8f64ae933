"""Logical parameters: the content of a Megatron model in terms of Hugging Face tensors.

A :class:`Param` is one *unsharded* Megatron parameter under its global name (global layer, global
expert). It lists the Hugging Face tensors that it consists of, and how tensor parallelism cuts it.
So loading and exporting are one list of :class:`Copy`, read in opposite directions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Parallel(Enum):
    """How a parameter is cut over its tensor-parallel group."""

    COLUMN = "column"  # along dim 0, the output features
    ROW = "row"  # along dim 1, the input features
    REPLICATED = "replicated"


class Domain(Enum):
    """The parallel dimensions whose process groups hold the parameter."""

    DENSE = "dense"  # tensor parallel (tp), replicated over data parallel
    EXPERT = "expert"  # expert parallel (ep) x expert tensor parallel (etp)


class Stage(Enum):
    """The stages of a pipeline that hold the parameter."""

    LAYER = "layer"  # the one that has its layer
    FIRST = "first"
    LAST = "last"
    ENDS = "ends"  # the first and the last: an embedding that is the output layer too
    BOTH = "both"  # those two, as an embedding: layers for speculation on the last embed tokens


class Role(Enum):
    """The purpose of a parameter; only ``LINEAR`` ones are ever quantized."""

    LINEAR = "linear"
    BIAS = "bias"
    NORM = "norm"
    ROUTER = "router"
    EMBEDDING = "embedding"
    OUTPUT = "output"
    CACHE = "kv cache"  # a scale of cached keys or values
    OTHER = "no linear"  # convolutions, tables, small gates
    OUTSIDE = "outside the text decoder"  # vision and audio towers, projectors
    DRAFT = "token prediction"  # layers beyond the model's own, for speculative decoding
    DRAFT_LINEAR = "linear of token prediction"  # which a rule may quantize that says so


DRAFTS = (Role.DRAFT, Role.DRAFT_LINEAR)
CARRIED = (Role.OUTSIDE, *DRAFTS)
"""What a live Megatron model need not hold: an export then takes it from the source's files."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor: ``start`` and ``size`` per dim (1-D or 2-D)."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """Return the index for ``tensor[box.index]``."""
        return tuple(slice(o, o + n) for o, n in zip(self.start, self.size, strict=True))


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box of all of a tensor."""
    return Box((0,) * len(shape), shape)


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its full name (``...q_proj.weight``) and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """Return the name without its last part (``...q_proj``), which recipes and engines use."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Copy:
    """``local[dst.index] <-> hf[src.index]``: one rectangle that a rank holds of ``source``."""

    source: Source
    src: Box
    dst: Box


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of a source that follow one another in a parameter, for each of its groups.

    Attributes:
        source: Number of the source among the parameter's.
        start: First of them within a group of the source, or before its first group.
        count: How many of them a group has.
        stride: Rows of the source from one group to the next.
    """

    source: int
    start: int
    count: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class Inside:
    """Where a parameter lies in a larger one that Megatron has.

    Attributes:
        name: Global Megatron name of the larger one.
        before: Rows of it, unsharded, before the parameter's.
        rows: All rows of it, unsharded.
    """

    name: str
    before: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Param:
    """One logical Megatron parameter.

    Attributes:
        name: Global Megatron name, e.g. ``decoder.layers.0.mlp.experts.linear_fc1.weight5``.
        sources: Hugging Face tensors that make it up, in Megatron's order of rows. The rows of
            several are interleaved: within each of ``groups`` groups the sources follow one another
            (q, k, v per query group; gate, up per rank).
        shape: Logical (unsharded) shape, without vocabulary padding.
        role: Its purpose.
        parallel: How tensor parallelism cuts it.
        domain: Whose process groups hold it.
        groups: Groups of interleaved rows; 0 for one a rank.
        layer: Global index of its layer; None where it is in none.
        expert: Global index of its expert; None where it is in none.
        stage: Where a pipeline keeps it. A parameter without a layer has another than ``LAYER``.
        fused: Name of the linear that engines make of it and other parameters, which then share
            format and scales; empty where they leave it alone.
        fp32: Whether it stays in float32, whatever the model's dtype. Megatron has it as a buffer.
        called: Modules under which engines build its sources, where they call them otherwise.
        order: What each group has, in Megatron's order of rows, where sources do not follow one
            another whole.
        by_item: Whether all groups' rows of one item of ``order`` follow one another; otherwise all
            items of one group do.
        kept: Names that Megatron's checkpoints append for the rows of each item of ``order``, which
            they store as a tensor by itself; empty where they store the parameter whole.
        inside: Where it lies in a larger parameter; None where it is one by itself.
        shift: What Megatron's values are larger by than Hugging Face's.
        wide: Whether a model that this library builds has it in float32, as its values need. An
            export has it in the source's dtype; in float32 where that is not known.
        copy_of: Name of the parameter that has its values in a live model; empty for itself.
        padded: Rows of a vocabulary in a live model, padding included; 0 for the next multiple of
            the shards. No file has the padding.
    """

    name: str
    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    role: Role
    parallel: Parallel
    domain: Domain = Domain.DENSE
    groups: int = 0
    layer: int | None = None
    expert: int | None = None
    stage: Stage = Stage.LAYER
    fused: str = ""
    fp32: bool = False
    padded: int = 0
    called: tuple[str, ...] = ()
    order: tuple[Rows, ...] = ()
    by_item: bool = False
    kept: tuple[str, ...] = ()
    inside: Inside | None = None
    shift: float = 0.0
    wide: bool = False
    copy_of: str = ""

    @property
    def live(self) -> str:
        """Return the global name of the Megatron parameter that has its values."""
        return self.inside.name if self.inside else self.copy_of or self.name

    @property
    def module(self) -> str:
        """Return the Megatron module that owns the parameter (the name without its last part)."""
        return self.live.rpartition(".")[0]


def replicated(name: str, source: str, shape: tuple[int, ...], role: Role) -> Param:
    """Describe one Hugging Face tensor, ``source``, that every tensor-parallel rank has whole."""
    return Param(
        name=name,
        sources=(Source(source, shape),),
        shape=shape,
        role=role,
        parallel=Parallel.REPLICATED,
    )


def num_layers(params: Iterable[Param]) -> int:
    """Count the layers of the model."""
    return max((p.layer + 1 for p in params if p.layer is not None), default=0)


def num_experts(params: Iterable[Param]) -> int:
    """Count the routed experts a layer; 0 for a dense model."""
    return max((p.expert + 1 for p in params if p.expert is not None), default=0)


def engine_groups(params: Iterable[Param]) -> tuple[tuple[Source, ...], ...]:
    """Group the sources that engines make one linear of, from one Megatron parameter or several."""
    found: dict[str, tuple[Source, ...]] = {}
    for param in params:
        key = param.fused or param.name
        found[key] = (*found.get(key, ()), *param.sources)
    return tuple(found.values())
