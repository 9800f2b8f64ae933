from .architecture import Architecture as Architecture
from .config import positive as positive
from .counts import check_counts as check_counts
from .layout import check_context as check_context
from .layout import check_layout as check_layout
from .layout import copies as copies
from .layout import local_shape as local_shape
from .layout import padded_vocab as padded_vocab
from .moe import idle_experts as idle_experts
from .pipeline import Pipeline as Pipeline
from .pipeline import Stages as Stages
from .registry import ARCHITECTURES as ARCHITECTURES
from .registry import lookup as lookup
from .registry import lookup_live as lookup_live
from .spec import CARRIED as CARRIED
from .spec import DRAFTS as DRAFTS
from .spec import Box as Box
from .spec import Copy as Copy
from .spec import Domain as Domain
from .spec import Parallel as Parallel
from .spec import Param as Param
from .spec import Role as Role
from .spec import Source as Source
from .spec import Stage as Stage
from .spec import engine_groups as engine_groups
from .spec import num_experts as num_experts
from .spec import num_layers as num_layers
from .spec import whole as whole
from .speculation import count_drafts as count_drafts
from .speculation import draft_counts as draft_counts
from .speculation import has_drafts as has_drafts
from .speculation import is_draft as is_draft
from .speculation import stated_drafts as stated_drafts
from .stacks import View as View
from .stacks import unstack as unstack
from .structure import Structure as Structure
from .structure import decoder_of as decoder_of
from .structure import describe_structure as describe_structure
from .structure import has_table as has_table
from .structure import has_towers as has_towers
from .structure import is_carried as is_carried
from .structure import table_names as table_names
from .text import family as family
from .text import has_plain_router as has_plain_router
from .text import has_stacks_alone as has_stacks_alone
from .text import run_as as run_as
from .text import text_config as text_config

__all__ = [
    "ARCHITECTURES",
    "CARRIED",
    "DRAFTS",
    "Architecture",
    "Box",
    "Copy",
    "Domain",
    "Parallel",
    "Param",
    "Pipeline",
    "Role",
    "Source",
    "Stage",
    "Stages",
    "Structure",
    "View",
    "check_context",
    "check_counts",
    "check_layout",
    "copies",
    "count_drafts",
    "decoder_of",
    "describe_structure",
    "draft_counts",
    "engine_groups",
    "family",
    "has_drafts",
    "has_plain_router",
    "has_stacks_alone",
    "has_table",
    "has_towers",
    "idle_experts",
    "is_carried",
    "is_draft",
    "local_shape",
    "lookup",
    "lookup_live",
    "num_experts",
    "num_layers",
    "padded_vocab",
    "positive",
    "run_as",
    "stated_drafts",
    "table_names",
    "text_config",
    "unstack",
    "whole",
]
