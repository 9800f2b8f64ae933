"""Quantization of Megatron-Core / Transformer Engine models, mixture-of-experts first.

Everything is imported when it is first used: ``import megatron_quant`` loads neither torch nor
Megatron.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
