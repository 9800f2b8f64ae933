"""Which tensors of a model an engine keeps in its KV cache: keys and values of every attention."""

from dataclasses import dataclass

from megatron_quant.recipes.plan import QuantPlan, Slot

PARTS = ("k", "v")
_KEYS = ".k_proj"


@dataclass(frozen=True)
class CacheSlot:
    """The cached keys (``part`` k) or values (v) of one attention; equal on every rank.

    attention: its Hugging Face module, ``model.layers.0.self_attn``.
    """

    attention: str
    part: str

    @property
    def name(self) -> str:
        """Under which its statistic is kept."""
        return f"{self.attention}.{self.part}"


def cache_slots(plan: QuantPlan) -> tuple[CacheSlot, ...]:
    """All of them, in the order of the model; none where the plan leaves the cache as it is.

    Every attention caches, also one whose weights are excluded.
    """
    found = (attention_of(d.slot) for d in plan.decisions) if plan.kv_cache else ()
    return tuple(CacheSlot(attention, part) for attention in found if attention for part in PARTS)


def attention_of(slot: Slot) -> str | None:
    """The attention whose keys the weight makes; None for another weight, and for a bias."""
    if slot.fixed:
        return None
    keys = next((s for s in slot.sources if s.endswith(_KEYS)), None)
    return keys.removesuffix(_KEYS) if keys else None
