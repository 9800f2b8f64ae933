"""Number formats: pure functions between a tensor and what a checkpoint stores of it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
