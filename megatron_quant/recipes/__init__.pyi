from .coverage import AuditRow as AuditRow
from .coverage import audit as audit
from .document import rule_document as rule_document
from .document import to_document as to_document
from .kv_cache import CAST_AMAX as CAST_AMAX
from .kv_cache import CacheSlot as CacheSlot
from .kv_cache import attention_of as attention_of
from .kv_cache import cache_slots as cache_slots
from .load import family_recipe_names as family_recipe_names
from .load import is_preset as is_preset
from .load import load_recipe as load_recipe
from .load import recipe_names as recipe_names
from .parse import parse_recipe as parse_recipe
from .plan import DRAFT as DRAFT
from .plan import OUTPUT as OUTPUT
from .plan import Decision as Decision
from .plan import QuantPlan as QuantPlan
from .plan import Slot as Slot
from .plan import difference as difference
from .reached import accept_cold as accept_cold
from .reached import check_reached as check_reached
from .reached import largest_shared as largest_shared
from .resolution import refuse_output as refuse_output
from .resolution import resolve as resolve
from .schema import EXPERT_SCALES as EXPERT_SCALES
from .schema import KV_CACHES as KV_CACHES
from .schema import Recipe as Recipe
from .schema import Rule as Rule
from .schema import weight_only as weight_only
from .schema import with_algorithm as with_algorithm
from .schema import with_alpha as with_alpha
from .schema import with_damp as with_damp
from .schema import with_kv_cache as with_kv_cache
from .schema import with_mtp as with_mtp

__all__ = [
    "CAST_AMAX",
    "DRAFT",
    "EXPERT_SCALES",
    "KV_CACHES",
    "OUTPUT",
    "AuditRow",
    "CacheSlot",
    "Decision",
    "QuantPlan",
    "Recipe",
    "Rule",
    "Slot",
    "accept_cold",
    "attention_of",
    "audit",
    "cache_slots",
    "check_reached",
    "difference",
    "family_recipe_names",
    "is_preset",
    "largest_shared",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
    "refuse_output",
    "resolve",
    "rule_document",
    "to_document",
    "weight_only",
    "with_algorithm",
    "with_alpha",
    "with_damp",
    "with_kv_cache",
    "with_mtp",
]
