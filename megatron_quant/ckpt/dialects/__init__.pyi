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
from .stack_names import BLOCKS as BLOCKS
from .stack_names import GROUP as GROUP
from .stack_names import SCALES as SCALES
from .stack_names import StackPlace as StackPlace
from .stack_names import stack_name as stack_name
from .stack_names import stack_place as stack_place
from .stack_names import stack_shape as stack_shape
from .stack_names import stacked_rows as stacked_rows

__all__ = [
    "BLOCKS",
    "DIALECT_NAMES",
    "FILES",
    "GROUP",
    "HF_QUANT_CONFIG",
    "INPUT_SCALE",
    "K_SCALE",
    "PLAIN",
    "SCALES",
    "SHAPE",
    "V_SCALE",
    "WEIGHT_SCALE",
    "Dialect",
    "Layer",
    "ModuleFormat",
    "Shape",
    "StackPlace",
    "StorageScheme",
    "StorageSchemes",
    "Stored",
    "cells",
    "describe_format",
    "dialect_of",
    "get_dialect",
    "layer_of",
    "packings",
    "quantization_of",
    "refuse_cache",
    "stack_name",
    "stack_place",
    "stack_shape",
    "stacked_rows",
    "stored_by",
    "without_quantization",
]
