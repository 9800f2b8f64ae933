"""Plan the files of an export, and which rank writes them; nothing here touches a tensor."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
