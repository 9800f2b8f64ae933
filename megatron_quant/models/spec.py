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


CARRIED = (Role.OUTSIDE, Role.DRAFT)
"""What no live Megatron model holds: an export takes it from the source's files."""


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

    @property
    def module(self) -> str:
        """Return the Megatron module that owns the parameter (the name without its last part)."""
        return self.name.rpartition(".")[0]


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
