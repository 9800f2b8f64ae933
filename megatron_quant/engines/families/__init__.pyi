from .every import COUNTS as COUNTS
from .lookup import DENSE as DENSE
from .lookup import EMBEDDINGS as EMBEDDINGS
from .lookup import HEADS as HEADS
from .lookup import LAYERS as LAYERS
from .lookup import checkpoint_name as checkpoint_name
from .lookup import dense_row as dense_row
from .lookup import engine_names as engine_names
from .lookup import family_of as family_of
from .lookup import fused_names as fused_names
from .lookup import fused_sets as fused_sets
from .lookup import stack_of as stack_of
from .record import Family as Family
from .record import Layout as Layout
from .record import RunAs as RunAs

__all__ = [
    "COUNTS",
    "DENSE",
    "EMBEDDINGS",
    "HEADS",
    "LAYERS",
    "Family",
    "Layout",
    "RunAs",
    "checkpoint_name",
    "dense_row",
    "engine_names",
    "family_of",
    "fused_names",
    "fused_sets",
    "stack_of",
]
