from .cost import Cost as Cost
from .cost import Spread as Spread
from .cost import measured as measured
from .cost import spread as spread
from .export_plan import ExportPlan as ExportPlan
from .export_plan import plan_export as plan_export
from .parts import Piece as Piece
from .parts import RankPart as RankPart
from .parts import StoredTensor as StoredTensor
from .placing import StorageRules as StorageRules
from .proof import check_plan as check_plan
from .provenance import Origin as Origin
from .provenance import digest_of as digest_of
from .provenance import digest_of_parts as digest_of_parts
from .provenance import recipe_digest as recipe_digest
from .provenance import source_digest as source_digest
from .quantizable import slots as slots
from .ranks import Coord as Coord
from .ranks import Layout as Layout
from .row_joins import Filled as Filled
from .row_joins import Join as Join
from .row_joins import Joint as Joint
from .row_joins import batches as batches
from .row_joins import joints as joints
from .shards import regions as regions
from .sidecars import CONFIG as CONFIG
from .sidecars import Companions as Companions
from .sidecars import companions as companions
from .slabs import Slab as Slab
from .slabs import with_slabs as with_slabs

__all__ = [
    "CONFIG",
    "Companions",
    "Coord",
    "Cost",
    "ExportPlan",
    "Filled",
    "Join",
    "Joint",
    "Layout",
    "Origin",
    "Piece",
    "RankPart",
    "Slab",
    "Spread",
    "StorageRules",
    "StoredTensor",
    "batches",
    "check_plan",
    "companions",
    "digest_of",
    "digest_of_parts",
    "joints",
    "measured",
    "plan_export",
    "recipe_digest",
    "regions",
    "slots",
    "source_digest",
    "spread",
    "with_slabs",
]
