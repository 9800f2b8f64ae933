"""Score a live Megatron model's places, at any layout: by gradients, or by divergence."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
