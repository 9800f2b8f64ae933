"""Move factors from the inputs of weights into what comes before: awq and smoothquant."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
