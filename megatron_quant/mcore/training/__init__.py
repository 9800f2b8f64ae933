"""Hooks for the training loops of Megatron-LM and Megatron-Bridge."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
