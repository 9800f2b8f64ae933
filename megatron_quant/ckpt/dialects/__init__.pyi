from .base import INPUT_SCALE as INPUT_SCALE
from .base import K_SCALE as K_SCALE
from .base import SHAPE as SHAPE
from .base import V_SCALE as V_SCALE
from .base import WEIGHT_SCALE as WEIGHT_SCALE
from .base import Dialect as Dialect
from .base import Layer as Layer
from .base import ModuleFormat as ModuleFormat
from .base import Stored as Stored
from .base import layer_of as layer_of
from .base import stored_by as stored_by
from .common import describe_format as describe_format
from .common import refuse_cache as refuse_cache
from .detect import FILES as FILES
from .detect import dialect_of as dialect_of
from .detect import has_expert_stacks as has_expert_stacks
from .detect import quantization_of as quantization_of
from .detect import without_quantization as without_quantization
from .modelopt import HF_QUANT_CONFIG as HF_QUANT_CONFIG
from .registry import DIALECT_NAMES as DIALECT_NAMES
from .registry import get_dialect as get_dialect
from .scheme import PLAIN as PLAIN
from .scheme import Shape as Shape
from .scheme import StorageScheme as StorageScheme
from .scheme import StorageSchemes as StorageSchemes
from .scheme import cells as cells
from .scheme import packings as packings

__all__ = [
    "DIALECT_NAMES",
    "FILES",
    "HF_QUANT_CONFIG",
    "INPUT_SCALE",
    "K_SCALE",
    "PLAIN",
    "SHAPE",
    "V_SCALE",
    "WEIGHT_SCALE",
    "Dialect",
    "Layer",
    "ModuleFormat",
    "Shape",
    "StorageScheme",
    "StorageSchemes",
    "Stored",
    "cells",
    "describe_format",
    "dialect_of",
    "get_dialect",
    "has_expert_stacks",
    "layer_of",
    "packings",
    "quantization_of",
    "refuse_cache",
    "stored_by",
    "without_quantization",
]
