"""The versions that this room takes, and the differences between them, each with its version.

No other file asks for a version. An enum member or a function that came later is simply there in an
earlier one, where nothing looks for it. This file holds the differences that would go wrong. Found
in the wheels of 2.10 to 2.20; `make test-matrix` runs them.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library and the versions between which (inclusive) it was tested."""

    title: str
    distribution: str
    requirement: str
    first: str
    last: str

    def tested(self, version: str) -> bool:
        """Return whether ``version`` lies between the two."""
        return numbers(self.first) <= numbers(version) <= numbers(self.last)


LIBRARIES = (
    Library(
        title="Transformer Engine",
        distribution="transformer_engine",
        requirement="transformer-engine==2.20.2",
        first="2.10.0",
        last="2.20.2",
    ),
    Library(
        title="Megatron-Core",
        distribution="megatron-core",
        requirement="megatron-core==0.16.1",
        first="0.16.1",
        last="0.19.2",
    ),
)


@dataclass(frozen=True)
class Removed:
    """Members (of an enum of transformer_engine_torch) that existed before ``since``."""

    since: str
    enum: str
    members: dict[str, int]


_REMOVED = (
    Removed("2.12", "Float8BlockScaleTensorFormat", {"GEMM_READY": 0, "COMPACT": 1}),
    Removed("2.16", "NVTE_Fused_Attn_Backend", {"NVTE_F16_max512_seqlen": 0}),
)
# Methods that return a context manager: from ``since`` on, a value.
_NO_CONTEXT_MANAGER = {"TransformerEngineBaseModule.prepare_forward": "2.12"}
# get_fused_attn_backend gives (backend, why no other): before, the backend alone.
_FUSED_ATTENTION_REASON = "2.20"
# A compiled Transformer Engine loads the module that NVTE_PLUGIN names.
PLUGIN = "2.20"


def numbers(version: str) -> tuple[int, ...]:
    """Return major, minor and patch as far as they are numbers: "2.8.0a0+nv25.8" is (2, 8)."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def removed_members(version: str) -> dict[str, dict[str, int]]:
    """Map enum name to the members that ``version`` still has."""
    return {r.enum: r.members for r in _REMOVED if numbers(version) < numbers(r.since)}


def fused_attention_answer(version: str, no_backend: Any) -> Any:
    """Return the answer of get_fused_attn_backend where there is none."""
    if numbers(version) < numbers(_FUSED_ATTENTION_REASON):
        return no_backend
    return no_backend, "CPU"


def context_managers(version: str) -> set[str]:
    """Return ``class.method`` of those that return a context manager in ``version``."""
    return {
        method for method, since in _NO_CONTEXT_MANAGER.items() if numbers(version) < numbers(since)
    }
