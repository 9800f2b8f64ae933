"""The number formats: one record each, which holds all that the library knows of it.

A new format whose scale rule and element exist already is one more record here. A new rule or
element also gets a name in ``formats/numbers/arithmetic.py``. Each dialect says how checkpoints
call the format. Nothing here needs torch.
"""

from dataclasses import replace

from megatron_quant.errors import FormatError
from megatron_quant.formats.record import CHANNEL, Arithmetic, Field, Format, regrouped
from megatron_quant.native import WHOLE

__all__ = [
    "CHANNEL",
    "FORMATS",
    "GROUP_SIZES",
    "WHOLE",
    "Field",
    "Format",
    "get_format",
    "regrouped",
    "stored_format",
    "with_signed_scales",
]

_SCALAR, _ROW = (WHOLE, WHOLE), (1, WHOLE)
_E4M3, _U8, _I8, _I32 = "float8_e4m3fn", "uint8", "int8", "int32"
_F32, _BF16 = "float32", "bfloat16"
_SIZES = (32, 64, 128, CHANNEL)
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0

_ALL = (
    # E4M3 with one scale: weight = elements * scale, scale = amax / 448.
    Format(
        name="fp8",
        bits=8,
        group_size=0,
        fields=(Field("elements", _E4M3, (1, 1)), Field("scale", _F32, _SCALAR)),
        arithmetic=Arithmetic(
            scale="tensor", divide="in_dtype", element="e4m3", loop="E4M3_BY_BF16"
        ),
        largest=_E4M3_MAX,
        inputs=("fp8", None),
        algorithms=("max", "mse", "gptq", "awq", "smoothquant"),
    ),
    # E4M3 with a scale per row: an output channel of a weight, a token of an activation.
    Format(
        name="fp8_channel",
        bits=8,
        group_size=CHANNEL,
        fields=(Field("elements", _E4M3, (1, 1)), Field("scale", _F32, _ROW)),
        arithmetic=Arithmetic(scale="fp8", divide="exact", element="e4m3", loop="E4M3"),
        inputs=("fp8_channel", None),
        algorithms=("max", "mse", "imatrix", "gptq", "awq", "smoothquant"),
    ),
    # E4M3 with a scale per 128 x 128 block (DeepSeek-V3).
    Format(
        name="fp8_block",
        bits=8,
        group_size=128,
        fields=(Field("elements", _E4M3, (1, 1)), Field("scale", _F32, (128, 128))),
        arithmetic=Arithmetic(scale="fp8", divide="exact", element="e4m3", loop="E4M3"),
        inputs=("fp8_group", None),
        algorithms=("max", "mse", "imatrix", "gptq", "awq", "smoothquant"),
    ),
    # E4M3 with a scale per 1 x 128: the activations that go with fp8_block.
    Format(
        name="fp8_group",
        bits=8,
        group_size=128,
        fields=(Field("elements", _E4M3, (1, 1)), Field("scale", _F32, (1, 128))),
        arithmetic=Arithmetic(scale="fp8", divide="exact", element="e4m3", loop="E4M3"),
    ),
    # INT8 with a scale per row, scale = amax / 127.5 (compressed-tensors).
    Format(
        name="int8",
        bits=8,
        group_size=CHANNEL,
        fields=(Field("elements", _I8, (1, 1)), Field("scale", _F32, _ROW)),
        arithmetic=Arithmetic(scale="int8_fp32", divide="exact", element="int8", loop="INT8"),
        inputs=("int8", "int8_tensor"),
        algorithms=("max", "mse", "imatrix", "gptq", "awq", "smoothquant"),
    ),
    # INT8 with one scale: static activations.
    Format(
        name="int8_tensor",
        bits=8,
        group_size=0,
        fields=(Field("elements", _I8, (1, 1)), Field("scale", _F32, _SCALAR)),
        arithmetic=Arithmetic(scale="tensor", divide="exact", element="int8", loop="INT8"),
        largest=127.5,
    ),
    # Symmetric INT4 in groups along K: eight codes (value + 8) an int32, bf16 scale per group.
    Format(
        name="int4",
        bits=4,
        group_size=128,
        fields=(Field("elements", _I32, (1, 8)), Field("scale", _BF16, (1, 128))),
        arithmetic=Arithmetic(
            scale="int4_bf16", divide="by_bf16", element="int4", loop="INT4_BY_BF16"
        ),
        group_sizes=_SIZES,
        inputs=(None, "fp8", "fp8_channel"),
        algorithms=("max", "mse", "imatrix", "gptq", "awq", "smoothquant"),
    ),
    # Asymmetric: value = (code - zero) * scale, zero a code in 0..15.
    Format(
        name="int4_asym",
        bits=4,
        group_size=128,
        fields=(
            Field("elements", _I32, (1, 8)),
            Field("scale", _BF16, (1, 128)),
            Field("zero", _U8, (1, 128)),
        ),
        arithmetic=Arithmetic(
            scale="int4_zero", divide="by_bf16", element="int4", loop="INT4_ZERO_BY_BF16"
        ),
        zero_point=True,
        group_sizes=_SIZES,
        inputs=(None, "fp8"),
        algorithms=("max", "mse", "imatrix", "gptq", "awq", "smoothquant"),
    ),
    # Symmetric INT8 in groups: four codes (value + 128) an int32.
    Format(
        name="int8_group",
        bits=8,
        group_size=128,
        fields=(Field("elements", _I32, (1, 4)), Field("scale", _BF16, (1, 128))),
        arithmetic=Arithmetic(
            scale="int8_bf16", divide="by_bf16", element="int8_words", loop="UINT8_BY_BF16"
        ),
        group_sizes=_SIZES,
        inputs=(None,),
        algorithms=("max", "mse", "imatrix", "gptq", "awq"),
    ),
    # NVFP4: two E2M1 codes a byte (low nibble first), E4M3 scale per 16, fp32 scale per tensor.
    Format(
        name="nvfp4",
        bits=4,
        group_size=16,
        fields=(
            Field("elements", _U8, (1, 2)),
            Field("block_scale", _E4M3, (1, 16)),
            Field("tensor_scale", _F32, _SCALAR),
        ),
        arithmetic=Arithmetic(
            scale="nvfp4", divide="exact", element="e2m1", loop="E2M1", one_pass=True
        ),
        largest=_E2M1_MAX * _E4M3_MAX,
        full_blocks=True,
        scale_bits=(4, 3),
        inputs=("nvfp4", None),
        algorithms=("max", "mse", "imatrix", "four_over_six", "gptq", "awq", "smoothquant"),
    ),
    # OCP microscaling: E8M0 scale (exponent + 127) per 32; E4M3 and E2M1 elements.
    Format(
        name="mxfp8",
        bits=8,
        group_size=32,
        fields=(Field("elements", _E4M3, (1, 1)), Field("scale", _U8, (1, 32))),
        arithmetic=Arithmetic(scale="mxfp8", divide="exact", element="e4m3", loop="E4M3"),
        full_blocks=True,
        scale_bits=(8, 0),
        inputs=("mxfp8", None),
        algorithms=("max", "gptq", "awq", "smoothquant"),
    ),
    Format(
        name="mxfp4",
        bits=4,
        group_size=32,
        fields=(Field("elements", _U8, (1, 2)), Field("scale", _U8, (1, 32))),
        arithmetic=Arithmetic(scale="mxfp4", divide="by_bf16", element="e2m1", loop="E2M1_BY_BF16"),
        full_blocks=True,
        scale_bits=(8, 0),
        inputs=(None, "mxfp4"),
        algorithms=("max", "gptq", "awq", "smoothquant"),
    ),
)

_READ_ONLY: dict[str, Format] = {
    f.name: f
    for f in (
        # value = (code - zero) * scale, zero a code in 0..255.
        Format(
            name="int8_asym",
            bits=8,
            group_size=128,
            fields=(
                Field("elements", _I32, (1, 4)),
                Field("scale", _BF16, (1, 128)),
                Field("zero", _U8, (1, 128)),
            ),
            arithmetic=Arithmetic(scale="int8_zero", divide="by_bf16", element="int8_words"),
            zero_point=True,
            group_sizes=_SIZES,
        ),
    )
}
"""Formats that other tools write and engines hardly run. No recipe may choose them."""

FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
"""Formats that a recipe may choose, for weights or for inputs."""

GROUP_SIZES: dict[str, tuple[int, ...]] = {
    f.name: f.group_sizes for f in (*_ALL, *_READ_ONLY.values()) if f.group_sizes
}
"""Formats whose group size may be chosen, and the sizes that engines read."""


def get_format(name: str, group_size: int | None = None) -> Format:
    """Return the format called ``name``, with another ``group_size`` where the format allows one.

    Args:
        name: Key of ``FORMATS``.
        group_size: Elements along K that share a scale, ``CHANNEL`` for all; the format's own
            where None.

    Raises:
        FormatError: For an unknown name or a group size that no engine reads.
    """
    if name not in FORMATS:
        raise FormatError(f"unknown number format {name!r}; known: {', '.join(sorted(FORMATS))}")
    return _in_groups(FORMATS[name], group_size)


def stored_format(name: str, group_size: int | None = None) -> Format:
    """Return the format of a stored weight, which may be one that no recipe can choose.

    Args:
        name: Key of ``FORMATS``, or the name of a format that is only read.
        group_size: Elements along K that share a scale; the format's own where None.

    Raises:
        FormatError: For a group size that no engine reads.
    """
    return _in_groups(_READ_ONLY.get(name) or FORMATS[name], group_size)


def with_signed_scales(fmt: Format) -> Format:
    """Return int4 whose scales have the sign that gives the largest value of a group code -8.

    Raises:
        FormatError: For another format.
    """
    if fmt.name != "int4":
        raise FormatError(f"only int4 has signed scales, not {fmt.name}")
    return replace(fmt, signed=True, arithmetic=replace(fmt.arithmetic, scale="int4_signed"))


def _in_groups(fmt: Format, group_size: int | None) -> Format:
    if group_size is None or group_size == fmt.group_size:
        return fmt
    allowed = fmt.group_sizes or (fmt.group_size,)
    if group_size not in allowed:
        spelled = ", ".join("channel" if g == CHANNEL else str(g) for g in allowed)
        raise FormatError(f"group_size {group_size} is not one of {fmt.name}'s: {spelled}")
    return regrouped(fmt, group_size)
