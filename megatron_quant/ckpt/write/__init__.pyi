from .carried import beside as beside
from .directory import Existing as Existing
from .directory import check_apart as check_apart
from .directory import check_target as check_target
from .encode_cache import produce_cache_scale as produce_cache_scale
from .encode_part import Produced as Produced
from .encode_part import check_finite as check_finite
from .encode_part import encoded as encoded
from .encode_part import produce as produce
from .exporter import Destination as Destination
from .exporter import export as export
from .lock import LOCK as LOCK
from .lock import Lock as Lock
from .manifest import digest_problems as digest_problems
from .manifest import plan_digest as plan_digest
from .pipeline import WriteOptions as WriteOptions
from .rank_work import Produce as Produce
from .tensors_in_memory import in_memory as in_memory
from .unfinished import names_in as names_in

__all__ = [
    "LOCK",
    "Destination",
    "Existing",
    "Lock",
    "Produce",
    "Produced",
    "WriteOptions",
    "beside",
    "check_apart",
    "check_finite",
    "check_target",
    "digest_problems",
    "encoded",
    "export",
    "in_memory",
    "names_in",
    "plan_digest",
    "produce",
    "produce_cache_scale",
]
