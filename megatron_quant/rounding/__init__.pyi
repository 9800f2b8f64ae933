from .algorithm import Given as Given
from .algorithm import default_damp as default_damp
from .algorithm import gptq as gptq
from .moment import Moments as Moments
from .moment import merged as merged
from .weights import importance as importance

__all__ = ["Given", "Moments", "default_damp", "gptq", "importance", "merged"]
