from .behind import QuantizedWeights as QuantizedWeights
from .behind import RoundedLayers as RoundedLayers
from .caches import calibrated_caches as calibrated_caches
from .folding import FoldedSums as FoldedSums
from .folding import find_fold as find_fold
from .folding import folded_amaxes as folded_amaxes
from .forced import forced_experts as forced_experts
from .input_sums import InputSums as InputSums
from .input_sums import MeasuredSums as MeasuredSums
from .input_sums import SumsFile as SumsFile
from .input_sums import weighed_inputs as weighed_inputs
from .inputs import InputAmaxes as InputAmaxes
from .inputs import merge_amaxes as merge_amaxes
from .inputs import merge_tokens as merge_tokens
from .inputs import static_inputs as static_inputs
from .inputs import with_carried as with_carried
from .memory import LayerMemory as LayerMemory
from .memory import layer_memory as layer_memory
from .model import input_keys as input_keys
from .model import keys_of as keys_of
from .model import load_model as load_model
from .model import quiet as quiet
from .model import run_model as run_model
from .model import watched as watched
from .observe import Seen as Seen
from .observe import WeightInputAmax as WeightInputAmax
from .part_source import PartSource as PartSource
from .part_source import scaled as scaled
from .part_split import bounded_parts as bounded_parts
from .produce import Producer as Producer
from .produce import unscaled as unscaled
from .scales import Sharing as Sharing
from .scales import per_expert as per_expert
from .scales import searched_amaxes as searched_amaxes
from .scales import shared as shared
from .scales import shared_amaxes as shared_amaxes
from .scales import slot_amaxes as slot_amaxes
from .search import searched_stat as searched_stat
from .skeleton import CannotWalk as CannotWalk
from .skeleton import Headed as Headed
from .skeleton import Skeleton as Skeleton
from .stages import Call as Call
from .states import StatesFile as StatesFile
from .walk import Borders as Borders
from .walk import Walk as Walk
from .walk import steps as steps
from .workplace import Workplace as Workplace

__all__ = [
    "Borders",
    "Call",
    "CannotWalk",
    "FoldedSums",
    "Headed",
    "InputAmaxes",
    "InputSums",
    "LayerMemory",
    "MeasuredSums",
    "PartSource",
    "Producer",
    "QuantizedWeights",
    "RoundedLayers",
    "Seen",
    "Sharing",
    "Skeleton",
    "StatesFile",
    "SumsFile",
    "Walk",
    "WeightInputAmax",
    "Workplace",
    "bounded_parts",
    "calibrated_caches",
    "find_fold",
    "folded_amaxes",
    "forced_experts",
    "input_keys",
    "keys_of",
    "layer_memory",
    "load_model",
    "merge_amaxes",
    "merge_tokens",
    "per_expert",
    "quiet",
    "run_model",
    "scaled",
    "searched_amaxes",
    "searched_stat",
    "shared",
    "shared_amaxes",
    "slot_amaxes",
    "static_inputs",
    "steps",
    "unscaled",
    "watched",
    "weighed_inputs",
    "with_carried",
]
