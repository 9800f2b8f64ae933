from .absmax import amax as amax
from .absmax import check_dtype as check_dtype
from .absmax import last_dim_amax as last_dim_amax
from .absmax import stack_amax as stack_amax
from .absmax import tensor_scale as tensor_scale
from .arithmetic import Kernel as Kernel
from .arithmetic import kernel_of as kernel_of
from .arithmetic import squares as squares
from .elements import E2M1 as E2M1
from .elements import E2M1_VALUES as E2M1_VALUES
from .elements import E4M3 as E4M3
from .elements import INT4 as INT4
from .elements import INT4_MAX as INT4_MAX
from .elements import INT4_MIN as INT4_MIN
from .elements import INT8 as INT8
from .elements import INT8_MAX as INT8_MAX
from .elements import INT8_MIN as INT8_MIN
from .elements import INT8_WORDS as INT8_WORDS
from .elements import Element as Element
from .elements import e2m1_codes as e2m1_codes
from .elements import e4m3 as e4m3
from .elements import e4m3_values as e4m3_values
from .pack import pack_nibbles as pack_nibbles
from .scales import ScaleFields as ScaleFields

__all__ = [
    "E2M1",
    "E2M1_VALUES",
    "E4M3",
    "INT4",
    "INT4_MAX",
    "INT4_MIN",
    "INT8",
    "INT8_MAX",
    "INT8_MIN",
    "INT8_WORDS",
    "Element",
    "Kernel",
    "ScaleFields",
    "amax",
    "check_dtype",
    "e2m1_codes",
    "e4m3",
    "e4m3_values",
    "kernel_of",
    "last_dim_amax",
    "pack_nibbles",
    "squares",
    "stack_amax",
    "tensor_scale",
]
