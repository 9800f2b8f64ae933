from .backend import AMAX as AMAX
from .backend import BLOCK_AMAX as BLOCK_AMAX
from .backend import KeptGrid as KeptGrid
from .backend import block_amax as block_amax
from .backend import set_block_amax as set_block_amax
from .backend import split_stat as split_stat
from .grouped import QuantGroupedLinear as QuantGroupedLinear
from .install import ExpertScales as ExpertScales
from .install import LocalWeight as LocalWeight
from .install import QuantLayer as QuantLayer
from .install import attach as attach
from .install import refit as refit
from .install import set_expert_scales as set_expert_scales
from .kv_cache import CachedTensor as CachedTensor
from .kv_cache import attach_kv_cache as attach_kv_cache
from .registry import register as register
from .registry import unregister as unregister
from .snapshot import as_before as as_before

__all__ = [
    "AMAX",
    "BLOCK_AMAX",
    "CachedTensor",
    "ExpertScales",
    "KeptGrid",
    "LocalWeight",
    "QuantGroupedLinear",
    "QuantLayer",
    "as_before",
    "attach",
    "attach_kv_cache",
    "block_amax",
    "refit",
    "register",
    "set_block_amax",
    "set_expert_scales",
    "split_stat",
    "unregister",
]
