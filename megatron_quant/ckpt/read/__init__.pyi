from .carried_weights import carrying as carrying
from .carried_weights import sharing as sharing
from .checks import PLAIN_DTYPES as PLAIN_DTYPES
from .checks import check_weights as check_weights
from .checks import is_buffer as is_buffer
from .checks import plain_dtypes as plain_dtypes
from .directory import open_directory as open_directory
from .finer_scales import KeptScales as KeptScales
from .folded import with_fold as with_fold
from .head import Compared as Compared
from .head import compared_heads as compared_heads
from .head import remember_heads as remember_heads
from .kv_cache import CacheScales as CacheScales
from .kv_cache import cache_scales as cache_scales
from .logical_tensors import kept_dtypes as kept_dtypes
from .logical_tensors import logical as logical
from .logical_tensors import open_original as open_original
from .logical_tensors import params_of as params_of
from .logical_tensors import plain_part as plain_part
from .logical_tensors import row_blocks as row_blocks
from .open import open_source as open_source
from .open import open_stored as open_stored
from .packed_weight import COLUMN_SCALE as COLUMN_SCALE
from .packed_weight import GROUP_INDEX as GROUP_INDEX
from .packed_weight import Packed as Packed
from .quantized import QuantizedCheckpoint as QuantizedCheckpoint
from .quantized import matrices as matrices
from .quantized import opened as opened
from .read_once import ReadOnce as ReadOnce
from .scale_keeping import Scales as Scales
from .scale_keeping import check_fused as check_fused
from .scale_keeping import check_shared as check_shared
from .scale_keeping import keeping as keeping
from .scale_keeping import kept_scales as kept_scales
from .shared_exponents import is_e8m0 as is_e8m0
from .shared_exponents import nan_of_e8m0 as nan_of_e8m0
from .source import Listed as Listed
from .source import TensorInfo as TensorInfo
from .source import TensorSource as TensorSource
from .source import Weights as Weights
from .source import Wrapped as Wrapped
from .source import fill as fill
from .stack_views import stacked as stacked

__all__ = [
    "COLUMN_SCALE",
    "GROUP_INDEX",
    "PLAIN_DTYPES",
    "CacheScales",
    "Compared",
    "KeptScales",
    "Listed",
    "Packed",
    "QuantizedCheckpoint",
    "ReadOnce",
    "Scales",
    "TensorInfo",
    "TensorSource",
    "Weights",
    "Wrapped",
    "cache_scales",
    "carrying",
    "check_fused",
    "check_shared",
    "check_weights",
    "compared_heads",
    "fill",
    "is_buffer",
    "is_e8m0",
    "keeping",
    "kept_dtypes",
    "kept_scales",
    "logical",
    "matrices",
    "nan_of_e8m0",
    "open_directory",
    "open_original",
    "open_source",
    "open_stored",
    "opened",
    "params_of",
    "plain_dtypes",
    "plain_part",
    "remember_heads",
    "row_blocks",
    "sharing",
    "stacked",
    "with_fold",
]
