from .callback import QuantCallback as QuantCallback
from .callback import Schedule as Schedule
from .callback import learn_scales as learn_scales
from .hooks import prepare as prepare
from .hooks import wrap_provider as wrap_provider

__all__ = ["QuantCallback", "Schedule", "learn_scales", "prepare", "wrap_provider"]
