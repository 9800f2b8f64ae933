from .algorithm import GptqSettings as GptqSettings
from .algorithm import default_damp as default_damp
from .algorithm import gptq as gptq
from .moment import Moments as Moments
from .moment import merged as merged
from .weights import importance as importance

__all__ = ["GptqSettings", "Moments", "default_damp", "gptq", "importance", "merged"]
