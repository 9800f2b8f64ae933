"""Find the tensors that an engine keeps in its KV cache: keys and values of every attention."""

from dataclasses import dataclass

from megatron_quant.recipes.plan import QuantPlan, Slot

PARTS = ("k", "v")
CAST_AMAX = 448.0
"""The amax that gives an FP8 scale of 1: keys and values are cast as they are."""
_KEYS, _BETA = ".k_proj", ".b_proj"


@dataclass(frozen=True)
class CacheSlot:
    """The cached keys (``part`` k) or values (v) of one attention; equal on every rank.

    Attributes:
        attention: Its Hugging Face module, ``model.layers.0.self_attn``.
        part: ``k`` or ``v``.
    """

    attention: str
    part: str

    @property
    def name(self) -> str:
        """Return the name under which its statistic is kept."""
        return f"{self.attention}.{self.part}"


def cache_slots(plan: QuantPlan) -> tuple[CacheSlot, ...]:
    """List all cache slots in the order of the model; none where the plan leaves the cache alone.

    Every attention caches, also one whose weights are excluded.
    """
    found = (attention_of(d.slot) for d in plan.decisions) if plan.kv_cache else ()
    return tuple(CacheSlot(attention, part) for attention in found if attention for part in PARTS)


def attention_of(slot: Slot) -> str | None:
    """Return the attention whose keys the weight makes and an engine caches.

    None for another weight, for a bias, and for linear attention by a delta rule (Kimi-Linear,
    Ling), whose beta is fused with its keys: it keeps a state, and caches no keys.
    """
    if slot.fixed or any(source.endswith(_BETA) for source in slot.sources):
        return None
    keys = next((s for s in slot.sources if s.endswith(_KEYS)), None)
    return keys.removesuffix(_KEYS) if keys else None
