from .blocks import Edge as Edge
from .blocks import Region as Region
from .blocks import block_stat as block_stat
from .blocks import check_storable as check_storable
from .blocks import edge_of as edge_of
from .blocks import grids as grids
from .blocks import put_together as put_together
from .blocks import rows_on as rows_on
from .blocks import whole_matrix as whole_matrix
from .codec import decode as decode
from .codec import encode as encode
from .codec import lost as lost
from .codec import lost_between as lost_between
from .grid import SIGNED as SIGNED
from .grid import encode_on as encode_on
from .grid import fake_quant_on as fake_quant_on
from .grid import scales_of as scales_of
from .numbers import E2M1 as E2M1
from .numbers import E2M1_VALUES as E2M1_VALUES
from .numbers import E4M3 as E4M3
from .numbers import INT4 as INT4
from .numbers import INT4_MAX as INT4_MAX
from .numbers import INT4_MIN as INT4_MIN
from .numbers import INT8 as INT8
from .numbers import INT8_MAX as INT8_MAX
from .numbers import INT8_MIN as INT8_MIN
from .numbers import INT8_WORDS as INT8_WORDS
from .numbers import Element as Element
from .numbers import ScaleFields as ScaleFields
from .numbers import amax as amax
from .numbers import e2m1_codes as e2m1_codes
from .numbers import e4m3 as e4m3
from .numbers import e4m3_values as e4m3_values
from .numbers import kernel_of as kernel_of
from .numbers import pack_nibbles as pack_nibbles
from .numbers import stack_amax as stack_amax
from .numbers import tensor_scale as tensor_scale
from .quantize_dequantize import fake_quant as fake_quant
from .search import FOUR_OVER_SIX_RANGE as FOUR_OVER_SIX_RANGE
from .search import MSE_MULTIPLIERS as MSE_MULTIPLIERS
from .search import MULTIPLIERS as MULTIPLIERS
from .search import SearchedPiece as SearchedPiece
from .search import choose as choose
from .search import errors as errors
from .search import histogram as histogram
from .search import percentile_amax as percentile_amax
from .spec import CHANNEL as CHANNEL
from .spec import FORMATS as FORMATS
from .spec import GROUP_SIZES as GROUP_SIZES
from .spec import Field as Field
from .spec import Format as Format
from .spec import get_format as get_format
from .spec import regrouped as regrouped
from .spec import stored_format as stored_format
from .spec import with_signed_scales as with_signed_scales

__all__ = [
    "CHANNEL",
    "E2M1",
    "E2M1_VALUES",
    "E4M3",
    "FORMATS",
    "FOUR_OVER_SIX_RANGE",
    "GROUP_SIZES",
    "INT4",
    "INT4_MAX",
    "INT4_MIN",
    "INT8",
    "INT8_MAX",
    "INT8_MIN",
    "INT8_WORDS",
    "MSE_MULTIPLIERS",
    "MULTIPLIERS",
    "SIGNED",
    "Edge",
    "Element",
    "Field",
    "Format",
    "Region",
    "ScaleFields",
    "SearchedPiece",
    "amax",
    "block_stat",
    "check_storable",
    "choose",
    "decode",
    "e2m1_codes",
    "e4m3",
    "e4m3_values",
    "edge_of",
    "encode",
    "encode_on",
    "errors",
    "fake_quant",
    "fake_quant_on",
    "get_format",
    "grids",
    "histogram",
    "kernel_of",
    "lost",
    "lost_between",
    "pack_nibbles",
    "percentile_amax",
    "put_together",
    "regrouped",
    "rows_on",
    "scales_of",
    "stack_amax",
    "stored_format",
    "tensor_scale",
    "whole_matrix",
    "with_signed_scales",
]
