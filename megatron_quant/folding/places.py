"""Find the places where factors can move: a norm or a linear, and all that reads its output."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from re import Pattern
from typing import Any

from megatron_quant.errors import ArchitectureError, RecipeError
from megatron_quant.folding import families
from megatron_quant.folding.families import FAMILIES, Family
from megatron_quant.models import CARRIED, Param, Role, positive, text_config
from megatron_quant.recipes import Decision, QuantPlan


@dataclass(frozen=True)
class Reader:
    """A quantized slot whose factors are wanted, with its tensors behind the place."""

    decision: Decision
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A norm, or the rows of a linear, whose outputs are divided by factors.

    Attributes:
        name: The Hugging Face module that is divided.
        layer: Its layer.
        cols: Number of its outputs, K; each has a factor.
        before: Tensors of it, weight and bias; their elements or rows are divided.
        norm: Whether it is a norm.
        offset: What is added to the norm's stored weight.
        after: Shape of each tensor whose columns are multiplied.
        readers: Those slots by whose statistics the factors are found.
        heads: Key-value heads whose outputs several query heads read, and how many: (G, R). Output
            G x D then is read as columns G x R x D.
        expert: Global index of the expert; None outside of one.
    """

    name: str
    layer: int
    cols: int
    before: tuple[str, ...]
    norm: bool
    offset: float = 0.0
    after: Mapping[str, tuple[int, ...]]
    readers: tuple[Reader, ...] = ()
    heads: tuple[int, int] = (1, 1)
    expert: int | None = None

    @property
    def algorithm(self) -> str:
        """Return that of its readers."""
        return self.readers[0].decision.algorithm

    @property
    def alpha(self) -> float | None:
        """Return that of its readers."""
        return self.readers[0].decision.alpha


@dataclass(frozen=True)
class Left:
    """A place that is not folded, though its readers ask for it, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Places:
    """The places of a model, and those that are left out."""

    folded: tuple[Place, ...] = ()
    left: tuple[Left, ...] = ()


def find_places(params: Sequence[Param], quant: QuantPlan, config: Mapping[str, Any]) -> Places:
    """Find the places of a model whose recipe has awq or smoothquant; none for another.

    Args:
        params: All logical parameters.
        quant: Decisions on them.
        config: Content of config.json.

    Raises:
        RecipeError: Where the model's norms are not known, or nothing can be folded.
    """
    if not quant.folds:
        return Places()
    kind = text_config(config).get("model_type")
    family = FAMILIES.get(str(kind))
    rule = next(d for d in quant.quantized if d.folds)
    if family is None:
        raise RecipeError(
            f"recipe {quant.recipe!r}, {rule.rule}: where a model of type {kind} could fold "
            f"factors is not known: take algorithm gptq or imatrix; known: {', '.join(FAMILIES)}"
        )
    folded: list[Place] = []
    left: list[Left] = []
    for layer in _layers(params, quant):
        for found in _of_layer(layer, family, config, quant):
            if isinstance(found, Left):
                left.append(found)
            else:
                folded.append(found)
    if not folded:
        why = f": {left[0].name} is left out, as {left[0].reason}" if left else ""
        raise RecipeError(
            f"recipe {quant.recipe!r}, {rule.rule}: {rule.algorithm} finds no place to fold "
            f"factors into{why}; take another algorithm"
        )
    return Places(tuple(folded), tuple(left))


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    decision: Decision | None


@dataclass(frozen=True)
class _Layer:
    """The tensors of a layer by the part of their names after ``prefix``."""

    index: int
    prefix: str
    tensors: Mapping[str, _Tensor]

    def under(self, prefixes: tuple[str, ...]) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefixes)]


def _layers(params: Sequence[Param], quant: QuantPlan) -> list[_Layer]:
    found: dict[str, tuple[int, dict[str, _Tensor]]] = {}
    for param in params:
        if param.layer is None or param.role in (*CARRIED, Role.CACHE):
            continue
        for source in param.sources:
            mark = f"layers.{param.layer}."
            at, within, name = source.name.partition(mark)
            if within:
                tensor = _Tensor(source.name, source.shape, quant.by_name.get(param.name))
                found.setdefault(f"{at}{mark}", (param.layer, {}))[1][name] = tensor
    return [_Layer(index, prefix, tensors) for prefix, (index, tensors) in found.items()]


def _of_layer(
    layer: _Layer, family: Family, config: Mapping[str, Any], quant: QuantPlan
) -> Iterator[Place | Left]:
    yield from _norm(
        layer,
        family,
        families.ATTENTION_NORM,
        (families.ATTENTIONS, families.ATTENTION_READERS, families.ATTENTION_OTHERS),
    )
    for norm, reader in families.LATENT:
        if f"{norm}.weight" in layer.tensors:
            yield from _place(layer, norm, family.offset, [f"self_attn.{reader}.weight"])
    yield from _values(layer, family, config, quant)
    yield from _norm(
        layer,
        family,
        family.mlp_norm,
        (families.MLPS, families.MLP_READERS, families.MLP_OTHERS),
    )
    yield from _gated(layer)


def _norm(
    layer: _Layer,
    family: Family,
    norm: str,
    known: tuple[tuple[str, ...], Pattern[str], Pattern[str]],
) -> Iterator[Place | Left]:
    prefixes, readers, others = known
    names = layer.under(prefixes)
    strange = [n for n in names if not (readers.fullmatch(n) or others.fullmatch(n))]
    after = sorted(name for name in names if readers.fullmatch(name))
    if strange and _wanted(layer, after):
        yield Left(f"{layer.prefix}{norm}", f"{layer.prefix}{strange[0]} may read it too")
    elif f"{norm}.weight" in layer.tensors:
        yield from _place(layer, norm, family.offset, after)


def _wanted(layer: _Layer, after: Sequence[str]) -> bool:
    decided = (layer.tensors[name].decision for name in after)
    return any(d is not None and d.folds for d in decided)


def _place(
    layer: _Layer, before: str, offset: float | None, after: Sequence[str]
) -> Iterator[Place | Left]:
    """Yield the place of ``before`` if its readers want factors; ``offset`` is a norm's."""
    if not _wanted(layer, after):
        return
    name = f"{layer.prefix}{before}"
    held = [f"{before}.{leaf}" for leaf in ("weight", "bias")]
    own = [layer.tensors[n] for n in held if n in layer.tensors]
    by_slot: dict[str, list[_Tensor]] = {}
    for tensor in (layer.tensors[n] for n in after):
        if tensor.decision is not None and tensor.decision.quantized:
            by_slot.setdefault(tensor.decision.slot.name, []).append(tensor)
    readers = []
    for tensors in by_slot.values():
        decision = tensors[0].decision
        assert decision is not None
        readers.append(Reader(decision, tuple(t.name for t in tensors)))
    ways = {(r.decision.algorithm, r.decision.alpha) for r in readers}
    if len(ways) > 1:
        first, second = sorted(ways, key=str)[:2]
        yield Left(name, f"its readers differ in algorithm ({_way(first)} and {_way(second)})")
        return
    yield Place(
        name=name,
        layer=layer.index,
        cols=own[0].shape[0],
        before=tuple(t.name for t in own),
        norm=offset is not None,
        offset=offset or 0.0,
        after={layer.tensors[n].name: layer.tensors[n].shape for n in after},
        readers=tuple(readers),
    )


def _way(way: tuple[str, float | None]) -> str:
    return way[0] if way[1] is None else f"{way[0]} with alpha {way[1]:g}"


def _gated(layer: _Layer) -> Iterator[Place | Left]:
    """Yield the places between the linears of each gated MLP."""
    for gate, up, down in families.GATED:
        for name in layer.under(families.MLPS):
            mlp, _, leaf = name.removesuffix(".weight").rpartition(".")
            if leaf == up and f"{mlp}.{gate}.weight" in layer.tensors:
                yield from _between(layer, f"{mlp}.{up}", f"{mlp}.{down}.weight")


def _between(layer: _Layer, before: str, after: str) -> Iterator[Place | Left]:
    """Yield the place between the rows of a linear and the columns of another."""
    for found in _place(layer, before, None, [after]):
        producer = layer.tensors[f"{before}.weight"].decision
        weights = producer.weights if producer is not None else None
        if weights is not None and (weights.stat_block or (0, 0))[0] != 1:
            yield Left(f"{layer.prefix}{before}", f"rows of {weights.name} weights share scales")
        elif isinstance(found, Place):
            expert = found.readers[0].decision.slot.expert
            yield replace(found, expert=expert)
        else:
            yield found


def _values(
    layer: _Layer, family: Family, config: Mapping[str, Any], quant: QuantPlan
) -> Iterator[Place | Left]:
    """Yield the place between values and the output of attention."""
    before, after = "self_attn.v_proj", "self_attn.o_proj.weight"
    if after not in layer.tensors or not _wanted(layer, [after]):
        return
    name, out = f"{layer.prefix}{before}", layer.tensors[after].shape
    if f"{before}.weight" not in layer.tensors:
        latent = "self_attn.kv_b_proj.weight" in layer.tensors
        why = "values come from kv_b_proj, which makes keys too" if latent else "there is none"
        yield Left(name, why)
        return
    rows = layer.tensors[f"{before}.weight"].shape[0]
    dim = _head_dim(config, out[1])
    if quant.kv_cache == "fp8":
        yield Left(name, "the scale of the KV cache is that of values as they are")
    elif not family.plain_values:
        yield Left(name, "values may be clipped before o_proj")
    elif not dim or rows % dim or out[1] % rows:
        yield Left(name, f"its {rows} rows are no whole heads of o_proj's {out[1]} columns")
    else:
        for found in _between(layer, before, after):
            heads = (rows // dim, out[1] // rows)
            yield replace(found, heads=heads) if isinstance(found, Place) else found


def _head_dim(config: Mapping[str, Any], cols: int) -> int:
    try:
        heads = positive(text_config(config), "num_attention_heads")
    except ArchitectureError:
        return 0
    return cols // heads if cols % heads == 0 else 0
