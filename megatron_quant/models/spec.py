"""Logical parameters: what a Megatron model holds, in terms of the Hugging Face tensors.

A :class:`Param` is one *unsharded* Megatron parameter under its global name (global layer, global
expert). It says of which Hugging Face tensors it is made and how tensor parallelism cuts it, so
that loading and exporting are the same list of :class:`Copy` read in opposite directions.
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
    """Whose process groups hold the parameter."""

    DENSE = "dense"  # tensor parallel (tp), replicated over data parallel
    EXPERT = "expert"  # expert parallel (ep) x expert tensor parallel (etp)


class Stage(Enum):
    """Which stages of a pipeline hold the parameter."""

    LAYER = "layer"  # the one that has its layer
    FIRST = "first"
    LAST = "last"
    ENDS = "ends"  # the first and the last: an embedding that is the output layer too


class Role(Enum):
    """What the parameter is; only ``LINEAR`` ones are ever quantized."""

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


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor: ``start`` and ``size`` per dim (1-D or 2-D)."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """For ``tensor[box.index]``."""
        return tuple(slice(o, o + n) for o, n in zip(self.start, self.size, strict=True))


def whole(shape: tuple[int, ...]) -> Box:
    """The box of all of a tensor."""
    return Box((0,) * len(shape), shape)


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its full name (``...q_proj.weight``) and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The name without its last part (``...q_proj``): what recipes and engines name."""
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

    name: global Megatron name, e.g. ``decoder.layers.0.mlp.experts.linear_fc1.weight5``.
    sources: the Hugging Face tensors that it is made of, in Megatron's order of rows. With more
        than one, rows are interleaved: within each of ``groups`` groups the sources follow one
        another (q, k, v per query group; gate, up per rank: ``groups`` is 0 for one a rank).
    shape: logical (unsharded) shape, without vocabulary padding.
    layer, expert: global indices; None where there is none.
    stage: where a pipeline keeps it; what has no layer says another than ``LAYER``.
    fused: names what engines make of it together with other parameters, all of which then share
        format and scales; empty where they leave it alone.
    fp32: it stays in float32, whatever the dtype of the model; such are buffers in Megatron.
    padded: rows of a vocabulary in a live model, its padding included; 0 for the next multiple of
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

    @property
    def module(self) -> str:
        """The Megatron module that owns the parameter (the name without its last part)."""
        return self.name.rpartition(".")[0]


def num_layers(params: Iterable[Param]) -> int:
    """Layers of the model."""
    return max((p.layer + 1 for p in params if p.layer is not None), default=0)


def num_experts(params: Iterable[Param]) -> int:
    """Routed experts a layer; 0 for a dense model."""
    return max((p.expert + 1 for p in params if p.expert is not None), default=0)


def engine_groups(params: Iterable[Param]) -> tuple[tuple[Source, ...], ...]:
    """What engines make one linear of, of one Megatron parameter or of several."""
    found: dict[str, tuple[Source, ...]] = {}
    for param in params:
        key = param.fused or param.name
        found[key] = (*found.get(key, ()), *param.sources)
    return tuple(found.values())
