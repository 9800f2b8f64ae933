"""The ways in which dialects of checkpoints store a quantized weight."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
