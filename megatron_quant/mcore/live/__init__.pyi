from .handle import HFModel as HFModel
from .handle import Quantized as Quantized
from .handle import quantized as quantized
from .live_parts import producer as producer
from .sequence import Asked as Asked
from .sequence import Terms as Terms
from .sequence import attach_plan as attach_plan
from .sequence import attach_recipe as attach_recipe
from .sequence import calibrate_quantized as calibrate_quantized
from .sequence import describe as describe

__all__ = [
    "Asked",
    "HFModel",
    "Quantized",
    "Terms",
    "attach_plan",
    "attach_recipe",
    "calibrate_quantized",
    "describe",
    "producer",
    "quantized",
]
