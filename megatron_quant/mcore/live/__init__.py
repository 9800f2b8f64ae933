"""A live model with quantizers: the one sequence that command line, hooks and library run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
