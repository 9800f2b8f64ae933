from .callback import QuantCallback as QuantCallback
from .callback import Schedule as Schedule
from .hooks import prepare as prepare
from .hooks import wrap_provider as wrap_provider

__all__ = ["QuantCallback", "Schedule", "prepare", "wrap_provider"]
