"""Recognise mixture-of-experts blocks by their structure.

One function finds a block, its router, its experts and the linears of each, so none is known
without the others. A tensor that looks like an expert and belongs to no block is an error.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_quant.engines.families import COUNTS
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.config import Config, positive
from megatron_quant.models.stacks import Shapes
from megatron_quant.models.text import family, text_config

_EXPERT = re.compile(r"(.*)\.experts\.(\d{1,9})\.(.+)")
_ROUTER = re.compile(
    r"(.*?)\.(router(\..+)?|router_bias|expert_bias|e_score_correction_bias|moe_statics\..+"
    r"|gate\.(wg\.)?(weight|bias|expert_bias|e_score_correction_bias|tid2eid))"
)
"""Tensors of a router. Its bias may lie beside it (LFM2-MoE, AFMoE, Ling, MiniMax, Ernie); in
place of one, DeepSeek-V4's first layers have a table of tokens."""
_GATED = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})
_UNGATED = ({"up_proj", "down_proj"},)
"""Linears of an expert, as checkpoints name them."""
_KNOWN = re.compile(
    r"(.*\.)?shared?_experts?\..+|(.*\.)?shared_expert_gate\.weight|.*\.routed_expert_\w+_proj\..+"
)
"""Names with ``expert`` in them that belong to no routed expert."""


@dataclass(frozen=True)
class MoeBlock:
    """One mixture of experts.

    Attributes:
        name: The module that holds router and experts.
        routers: Names of the router's tensors.
        experts: For each expert, the names of its tensors.
    """

    name: str
    routers: tuple[str, ...]
    experts: tuple[tuple[str, ...], ...]


def blocks(config: Config, layer: str, shapes: Shapes) -> tuple[MoeBlock, ...]:
    """Find the mixtures of experts among the tensors of one layer.

    Args:
        config: Content of config.json.
        layer: Prefix of all names of the layer.
        shapes: Shapes of the layer's tensors by name.

    Raises:
        ArchitectureError: For a router without experts or the reverse, for experts that are
            incomplete or not alike, and for any other name with ``expert`` in it.
    """
    experts: dict[str, dict[int, dict[str, str]]] = {}
    routers: dict[str, list[str]] = {}
    rest = []
    for name in shapes:
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
        elif match := _ROUTER.fullmatch(name):
            routers.setdefault(match[1], []).append(name)
        else:
            rest.append(name.removeprefix(layer))
    _refuse_strays(layer, rest)
    for name in experts.keys() ^ routers.keys():
        has, lacks = ("experts", "router") if name in experts else ("a router", "experts")
        raise ArchitectureError(
            f"{name} has {has} but no {lacks}, so it is no known mixture of experts, and none of "
            "its tensors may be skipped in silence; use a model that is stored as transformers does"
        )
    return tuple(
        MoeBlock(
            name,
            tuple(routers[name]),
            _checked(name, of_block, config, shapes, _rows(routers[name], shapes)),
        )
        for name, of_block in experts.items()
    )


def _refuse_strays(layer: str, names: list[str]) -> None:
    for name in names:
        if "expert" in name and not _KNOWN.fullmatch(name):
            raise ArchitectureError(
                f"{layer}{name} looks like an expert, but no rule knows its name or shape: it "
                "would be left out; use a model whose experts are stored as transformers does"
            )


def _rows(routers: list[str], shapes: Shapes) -> int:
    """Return the rows of a router: it has one for each expert, and some have more."""
    weights = [shapes[n] for n in routers if n.endswith(".weight") and len(shapes[n]) == 2]
    return max((shape[0] for shape in weights), default=0)


def _checked(
    name: str, experts: dict[int, dict[str, str]], config: Config, shapes: Shapes, rows: int
) -> tuple[tuple[str, ...], ...]:
    text = text_config(config)
    stated = next((k for k in COUNTS if text.get(k) is not None and text[k] != 0), None)
    count = (rows or len(experts)) if stated is None else positive(text, stated)
    missing = next((e for e in range(count) if e not in experts), None)
    if missing is not None or len(experts) != count:
        which = (
            f"expert {missing} is missing" if missing is not None else f"{len(experts)} are there"
        )
        who = "its router" if stated is None else "config.json"
        raise ArchitectureError(
            f"{name}.experts: {which}, {who} has {count} experts; fetch the checkpoint "
            "again, or correct config.json"
        )
    linears = {leaf.rpartition(".")[0] for leaf in experts[0]}
    of_family = family(config)
    allowed = _UNGATED if of_family is not None and not of_family.gated else _GATED
    if linears not in allowed:
        known = " or ".join(", ".join(sorted(names)) for names in allowed)
        raise ArchitectureError(
            f"{name}.experts.0 has the linears {', '.join(sorted(linears))}; known are {known}; "
            "use a model that has those"
        )
    first = {leaf: shapes[full] for leaf, full in experts[0].items()}
    for expert in range(count):
        own = {leaf: shapes[full] for leaf, full in experts[expert].items()}
        if own != first:
            odd = min(leaf for leaf, _ in own.items() ^ first.items())
            raise ArchitectureError(
                f"{name}.experts.{expert}.{odd} differs from that of expert 0, but a layer's "
                "experts must be alike; fetch the checkpoint again"
            )
    return tuple(tuple(experts[e].values()) for e in range(count))


def idle_experts(config: Config, names: Iterable[str]) -> dict[str, str]:
    """Name what transformers has for experts without weights, behind the last of each block.

    LongCat-Flash counts them in its stacks of gate and up, and never reads their rows.

    Args:
        config: Content of config.json.
        names: Names of the checkpoint's tensors.

    Returns:
        Name of each -> name of expert 0's tensor, whose shape it has.
    """
    known, text = family(config), text_config(config)
    key = known.idle_key if known is not None else ""
    if not key or not text.get(key):
        return {}
    stated = next((k for k in COUNTS if text.get(k)), COUNTS[0])
    first = positive(text, stated)
    last = first + positive(text, key)
    return {
        f"{match[1]}.experts.{expert}.{match[3]}": name
        for name in names
        if (match := _EXPERT.fullmatch(name)) and match[2] == "0"
        if match[3] in ("gate_proj.weight", "up_proj.weight")
        for expert in range(first, last)
    }
