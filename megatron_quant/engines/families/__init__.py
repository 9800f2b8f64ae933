"""Know each family of models: its names, and what engines do with them. Data alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
