"""A live model with quantizers. Command line, hooks and library run the same sequence."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
