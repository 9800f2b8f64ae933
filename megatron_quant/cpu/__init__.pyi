from .activation import activate as activate
from .activation import calls as calls
from .activation import transformer_config_overrides as transformer_config_overrides
from .activation import use_cpu as use_cpu

__all__ = [
    "activate",
    "calls",
    "transformer_config_overrides",
    "use_cpu",
]
