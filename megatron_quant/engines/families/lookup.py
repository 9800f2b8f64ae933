"""Look facts up by name, or by ``model_type`` if two families differ."""

import re
from collections.abc import Collection, Iterable
from functools import cache

from megatron_quant.engines.families import every
from megatron_quant.engines.families.record import Dense, Family, Fused, Stack
from megatron_quant.engines.families.registry import FAMILIES


def _all(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


DENSE = tuple(row for family in FAMILIES for row in family.dense)
"""Names decide, because derived models have their own ``model_type``."""
FUSED = (*every.FUSED, *(row for family in FAMILIES for row in family.fused))
STACKS = tuple(row for family in FAMILIES for row in family.stacks)
EMBEDDINGS = _all(("embed_tokens", *(family.embedding for family in FAMILIES)))
HEADS = _all(("lm_head", *(family.head for family in FAMILIES)))
LAYERS = _all(("num_hidden_layers", *(key for family in FAMILIES for key in family.layers)))
_DENSE = tuple((re.compile(row.names), row) for row in DENSE)


def family_of(kinds: Iterable[object]) -> Family | None:
    """Return the family of the first ``model_type`` that belongs to one; None if none does."""
    return next((f for kind in kinds for f in FAMILIES if kind in f.kinds), None)


def dense_row(name: str) -> Dense | None:
    """Return why engines keep a tensor unquantized; None for any other.

    Args:
        name: Name in the layer.
    """
    return next((row for pattern, row in _DENSE if pattern.fullmatch(name)), None)


@cache
def fused_sets(leaves: frozenset[str]) -> tuple[Fused, ...]:
    """Return the fused linears that engines make of a module's; each member is in at most one.

    If a member fits two, it goes to the one that fuses more of the module's linears.

    Args:
        leaves: Last parts of the names of the module's linears.
    """
    known = [f for f in FUSED if leaves.issuperset(f.marks) and len(leaves & set(f.members)) > 1]
    found: list[Fused] = []
    for fused in sorted(known, key=lambda f: -len(leaves & set(f.members))):
        if not any(set(fused.members) & set(other.members) & leaves for other in found):
            found.append(fused)
    return tuple(found)


def fused_names(leaves: Collection[str]) -> tuple[str, ...]:
    """Return every name that engines may give to what they fuse of ``leaves``, linears of a module.

    A config matches these names and the members' own.
    """
    own = set(leaves)
    known = (f for leaf in leaves for f in FUSED if leaf in f.members and own.issuperset(f.marks))
    return _all(fused.name for fused in known)


def engine_names(
    family: Family | None, modules: Iterable[str], drafts_after: int | None = None
) -> tuple[str, ...]:
    """Return the engine's names for those of ``modules`` that it calls differently.

    Args:
        family: The model's family; None for an unknown one.
        modules: Names of modules in the checkpoint.
        drafts_after: Number of the model's layers, if these are modules of layers that predict
            tokens ahead.
    """
    rows = (*every.CALLED, *(family.called if family is not None else ()))
    asked = [row for row in rows if drafts_after is not None or not row.drafts]
    return _all(
        match.expand(row.engine).replace("{layer}", str((drafts_after or 0) * row.numbered))
        for name in modules
        for row in asked
        if (match := _match(row.modules, name))
    )


def checkpoint_name(family: Family | None, name: str) -> str:
    """Return the checkpoint's name of a tensor that transformers calls ``name`` in its layer."""
    for pattern, replacement in family.loaded if family is not None else ():
        name = _compiled(pattern).sub(replacement, name, count=1)
    return name


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _match(pattern: str, name: str) -> re.Match[str] | None:
    return _compiled(pattern).fullmatch(name)


def stack_of(name: str) -> tuple[str, Stack] | None:
    """Return block and row of a stack that has its own kind of name; None for other tensors."""
    for row in STACKS:
        if match := _match(row.names, name):
            return match[1], row
    return None
