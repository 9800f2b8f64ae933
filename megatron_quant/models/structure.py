"""Recognise a model without a table by the names and shapes of its tensors.

Linears that engines fuse become one parameter, as in the tables. So recipes, scales, checks and
verification have one rule for both. Fused parameters have the names that vLLM gives them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_quant.engines.families import (
    EMBEDDINGS,
    HEADS,
    dense_row,
    engine_names,
    fused_sets,
)
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config, fields
from megatron_quant.models.moe import MoeBlock, blocks
from megatron_quant.models.registry import ARCHITECTURES, UNBUILT, lookup
from megatron_quant.models.spec import Domain, Parallel, Param, Role, Source, Stage, replicated
from megatron_quant.models.speculation import PREDICTS, is_draft, named_drafts
from megatron_quant.models.stacks import Shapes, View, first_expert, unstack
from megatron_quant.models.text import family, layers_of, text_config

_OUTPUTS = tuple(f"{head}.weight" for head in HEADS)
_ROW = ("o_proj", "down_proj", "w2", "out_proj", "dense", "wo_b", "output_linear")
"""Linears that engines cut along their input features."""
_KINDS: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"(.*[._])?norm\d*(_\d+)?\.(weight|bias)|.*layernorm(_\d+)?\.weight"), Role.NORM),
    (re.compile(r".*[._]bias|bias"), Role.BIAS),
)
"""Roles of a layer's tensors by their names in it. All other matrices are linears."""


@dataclass(frozen=True)
class Structure:
    """The logical parameters of a checkpoint, and the tensors of them that lie inside others."""

    params: tuple[Param, ...]
    views: Mapping[str, View]


def describe_structure(config: Config, shapes: Shapes) -> Structure:
    """Find the role of every tensor of a checkpoint, by the model's table where it has one.

    Args:
        config: Content of config.json.
        shapes: Shapes of the checkpoint's tensors by name.

    Raises:
        ArchitectureError: Where neither a table nor the names tell what a tensor is, above all one
            that may be an expert's.
    """
    if not has_table(config):
        return recognise(config, shapes)
    params = lookup(config).params(config)
    known = {s.name for p in params for s in p.sources}
    rest = {n: s for n, s in shapes.items() if n not in known}
    return Structure((*params, *_carried(config, rest)), {})


def _carried(config: Config, shapes: Shapes) -> Iterator[Param]:
    """Yield what lies beside the model that a table describes."""
    named = named_drafts(config, shapes)
    yield from named
    known = {s.name for p in named for s in p.sources}
    for name, shape in shapes.items():
        if name in known:
            continue
        if is_draft(config, name):
            param = _draft(name, shape)
            yield replace(param, called=_called(config, param))
        elif lookup(config).is_outside(name):
            yield replace(replicated(name, name, shape, Role.OUTSIDE), stage=Stage.LAST)


def is_carried(config: Config, name: str) -> bool:
    """Return whether a tensor lies beside the model that its table describes.

    It is of a layer for speculation, or of another model such as a vision tower.
    """
    return is_draft(config, name) or (has_towers(config) and lookup(config).is_outside(name))


def has_towers(config: Config) -> bool:
    """Return whether a table describes the model as a text decoder that others lie beside."""
    try:
        return bool(lookup(config).renamed) and has_table(config)
    except ArchitectureError:
        return False


def has_table(config: Config) -> bool:
    """Return whether the model is one that this library builds, and its table describes it."""
    try:
        architecture = lookup(config)
        architecture.decoder(config)
    except ArchitectureError:
        return False
    return architecture.name not in UNBUILT


def table_names(config: Config) -> frozenset[str]:
    """Return the tensors that the model's table names; empty where it has none."""
    if not has_table(config):
        return frozenset()
    return frozenset(s.name for p in lookup(config).params(config) for s in p.sources)


def recognise(config: Config, shapes: Shapes) -> Structure:
    """Find the role of every tensor by names and shapes, without the tables.

    Raises:
        ArchitectureError: Where names and shapes do not tell what a tensor is.
    """
    prefix, embedding = _embedding_of(shapes)
    layers = _layers(config, prefix, shapes)
    views = unstack(config, {n: s for n, s in shapes.items() if _layer_of(n, prefix) in layers})
    stacked = {view.stored for view in views.values()}
    tensors = {n: s for n, s in shapes.items() if n not in stacked}
    tensors |= {name: view.shape for name, view in views.items()}
    found: dict[str, Param] = {}
    by_layer: dict[int | None, dict[str, tuple[int, ...]]] = {}
    for name in sorted(tensors, key=_natural):
        layer = _layer_of(name, prefix)
        by_layer.setdefault(layer, {})[name] = tensors[name]
    for layer, of_layer in by_layer.items():
        if layer is not None and layer in layers:
            params = _of_layer(config, f"{prefix}layers.{layer}.", of_layer)
        else:
            params = _of_rest(prefix, embedding, of_layer, layer)
        for param in params:
            found[param.name] = replace(param, layer=layer, called=_called(config, param))
    return Structure(tuple(found.values()), views)


def _called(config: Config, param: Param) -> tuple[str, ...]:
    """Return what engines call its sources, where they call them otherwise."""
    modules, singles, after = [source.module for source in param.sources], [], None
    if param.role is Role.DRAFT:  # whose stacks are carried whole
        singles = [n for s in param.sources for n in first_expert(s.name, s.shape)]
        after = layers_of(config)
    return (*singles, *engine_names(family(config), [*modules, *singles], after))


def decoder_of(shapes: Shapes) -> str:
    """Return the prefix of the text decoder's names, such as ``model.language_model.``."""
    return _embedding_of(shapes)[0]


def _embedding_of(shapes: Shapes) -> tuple[str, str]:
    """Return the decoder's prefix, and the name of its embedding's weight."""
    numbered = {n.partition("layers.")[0] for n in shapes if "layers." in n}
    for module in EMBEDDINGS:
        leaf = f"{module}.weight"
        found = [n.removesuffix(leaf) for n in shapes if n == leaf or n.endswith(f".{leaf}")]
        if module != EMBEDDINGS[0]:  # towers have embeddings of these names too
            found = [prefix for prefix in found if prefix in numbered]
        if found:
            prefix = min(found, key=len)
            return prefix, f"{prefix}{leaf}"
    raise ArchitectureError(
        f"no tensor is called {EMBEDDINGS[0]}.weight, by which the text decoder is found; use a "
        f"model of {', '.join(ARCHITECTURES)} or one with such names"
    )


def _layers(config: Config, prefix: str, shapes: Shapes) -> range:
    count = layers_of(config)
    present = {_layer_of(name, prefix) for name in shapes}
    missing = next((i for i in range(count) if i not in present), None)
    if missing is not None:
        raise ArchitectureError(
            f"layer {missing} ({prefix}layers.{missing}) has no tensor, though config.json "
            f"has {count} layers; fetch the checkpoint again, or correct config.json"
        )
    return range(count)


def _layer_of(name: str, prefix: str) -> int | None:
    if not name.startswith(f"{prefix}layers."):
        return None
    number = name[len(prefix) :].split(".")[1]
    return int(number) if _is_number(number) else None


def _is_number(part: str) -> bool:
    """Return whether a part of a name counts something; beyond nine digits nothing does."""
    return part.isdecimal() and len(part) <= 9


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by value."""
    return [(int(p), "") if _is_number(p) else (-1, p) for p in re.split(r"(\d+)", name)]


def _of_rest(prefix: str, embedding: str, shapes: Shapes, layer: int | None) -> Iterator[Param]:
    for name, shape in shapes.items():
        if layer is not None or PREDICTS.match(name):
            yield _draft(name, shape)
            continue
        if name.endswith("lm_head.weight") or name in _OUTPUTS:
            role = Role.OUTPUT
        elif not name.startswith(prefix):
            role = Role.OUTSIDE
        elif name == embedding or EMBEDDINGS[0] in name:
            role = Role.EMBEDDING
        else:
            role = Role.NORM if "norm" in name else Role.OTHER
        yield replicated(name, name, shape, role)


def _draft(name: str, shape: tuple[int, ...]) -> Param:
    """Describe a tensor of layers that no Megatron model has; the last pipeline stage writes it."""
    return replace(replicated(name, name, shape, Role.DRAFT), stage=Stage.LAST)


def _of_layer(config: Config, layer: str, shapes: Shapes) -> Iterator[Param]:
    found = blocks(config, layer, shapes)
    routers = {name for block in found for name in block.routers}
    routed = {name for block in found for of_expert in block.experts for name in of_expert}
    linears: dict[str, tuple[int, ...]] = {}
    unquantized = _unquantized(config, layer)
    for name, shape in shapes.items():
        if name in routed:
            continue
        role = Role.ROUTER if name in routers else _role(name.removeprefix(layer), shape)
        if role is Role.LINEAR and name.startswith(unquantized):
            role = Role.OTHER
        if role is Role.LINEAR:
            linears[name] = shape
        else:
            yield replicated(name, name, shape, role)
    yield from _fuse(linears, config)
    for block in found:
        yield from _experts(block, shapes, config)


def _unquantized(config: Config, layer: str) -> tuple[str, ...]:
    """Return prefixes of what engines keep as it is since config.json says so."""
    known = family(config)
    listed = config.get(known.dense_key) if known is not None and known.dense_key else None
    names = listed if isinstance(listed, list) else []
    return tuple(f"{layer}{name}." for name in names if isinstance(name, str))


def _role(name: str, shape: tuple[int, ...]) -> Role:
    if (dense := dense_row(name)) is not None:
        return Role.ROUTER if dense.router else Role.OTHER
    for pattern, role in _KINDS:
        if pattern.fullmatch(name):
            return role
    return Role.LINEAR if len(shape) == 2 and name.endswith(".weight") else Role.OTHER


def _fuse(linears: Shapes, config: Config) -> Iterator[Param]:
    """Yield linears, fused ones put together, each at the place of its first member."""
    by_parent: dict[str, list[str]] = {}
    for name in linears:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        by_parent.setdefault(parent, []).append(leaf)
    sets = {parent: fused_sets(frozenset(leaves)) for parent, leaves in by_parent.items()}
    done: set[str] = set()
    for name, shape in linears.items():
        if name in done:
            continue
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        of_set = next((found for found in sets[parent] if leaf in found.members), None)
        fused = of_set.name if of_set is not None else leaf
        members = of_set.members if of_set is not None else (leaf,)
        names = [f"{parent}.{m}.weight" for m in members]
        names = [n for n in names if n in linears and linears[n][1:] == shape[1:]]
        done.update(names)
        sources = tuple(Source(n, linears[n]) for n in names)
        rows = sum(s.shape[0] for s in sources)
        parallel = Parallel.ROW if leaf in _ROW else Parallel.COLUMN
        param = Param(
            name=f"{parent}.{fused}.weight",
            sources=sources,
            shape=(rows, *shape[1:]),
            role=Role.LINEAR,
            parallel=parallel,
        )
        yield replace(param, groups=_groups(param, config))


def _groups(param: Param, config: Config) -> int:
    """Return the key-value heads of a fused qkv, which engines with more ranks copy; else 0."""
    keys = [s for s in param.sources if s.module.endswith(".k_proj")]
    if not keys:
        return 0
    text = fields(text_config(config))
    for count, dim in (
        ("num_key_value_heads", "head_dim"),
        ("num_global_key_value_heads", "global_head_dim"),
        ("swa_num_key_value_heads", "swa_head_dim"),
    ):
        if text.get(count) is None or text.get(dim) is None:
            continue
        heads = text.count(count)
        if heads * text.count(dim) == keys[0].shape[0]:
            return heads
    return 0


def _experts(block: MoeBlock, shapes: Shapes, config: Config) -> Iterator[Param]:
    """Yield each linear of all experts after another, in the order of the tables."""
    found: dict[str, list[Param]] = {}
    for expert, names in enumerate(block.experts):
        for param in _of_expert(block, names, shapes, config):
            found.setdefault(param.module.rpartition(".")[2], []).append(
                replace(param, domain=Domain.EXPERT, expert=expert)
            )
    for params in found.values():
        yield from params


def _of_expert(
    block: MoeBlock, names: tuple[str, ...], shapes: Shapes, config: Config
) -> Iterator[Param]:
    weights = {n: shapes[n] for n in names if n.endswith(".weight")}
    number = names[0].removeprefix(f"{block.name}.experts.").partition(".")[0]
    for param in _fuse(weights, config):
        leaf = param.module.rpartition(".")[2]
        yield replace(param, name=f"{block.name}.experts.{leaf}.weight{number}")
    for name in names:
        if name not in weights:
            yield replicated(name, name, shapes[name], Role.BIAS)
