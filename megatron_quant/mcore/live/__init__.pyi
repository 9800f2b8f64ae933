from .forced import forced_experts as forced_experts
from .handle import HFModel as HFModel
from .handle import Quantized as Quantized
from .handle import check_unquantized as check_unquantized
from .handle import is_quantized_model as is_quantized_model
from .handle import quantized as quantized
from .handle import read_hf_model as read_hf_model
from .live_parts import producer as producer
from .sequence import AttachSettings as AttachSettings
from .sequence import KeepSettings as KeepSettings
from .sequence import ResolvedRecipe as ResolvedRecipe
from .sequence import attach_plan as attach_plan
from .sequence import attach_recipe as attach_recipe
from .sequence import calibrate_quantized as calibrate_quantized
from .sequence import update as update

__all__ = [
    "AttachSettings",
    "HFModel",
    "KeepSettings",
    "Quantized",
    "ResolvedRecipe",
    "attach_plan",
    "attach_recipe",
    "calibrate_quantized",
    "check_unquantized",
    "forced_experts",
    "is_quantized_model",
    "producer",
    "quantized",
    "read_hf_model",
    "update",
]
