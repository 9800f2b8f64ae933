"""Exports that engines are known to reject or to misread, by dialect and format.

Found with vLLM 0.32 and transformers 5.23, and in the sources of TensorRT-LLM and SGLang. A
combination about which nothing is known is not refused.
"""

from dataclasses import dataclass

_EVERYTHING = ("modelopt", "compressed-tensors", "gptq", "awq", "auto-round", "fp8", "mxfp4")
V4 = "deepseek-v4"
"""Dialect of DeepSeek-V4's releases."""
READS = {
    "vllm": (*_EVERYTHING, V4),
    "transformers": _EVERYTHING[1:],
    "tensorrt-llm": ("modelopt", "fp8"),
    "sglang": (*_EVERYTHING, V4),
}
"""Engine -> dialects that it reads."""
ENGINES = tuple(READS)
"""Choices of ``--serve-engine``."""
SHARDED = ("vllm", "sglang", "tensorrt-llm")
"""Engines whose tensor parallelism gives each rank whole groups and blocks."""
WHOLE_GROUPS = ("compressed-tensors",)
"""Dialects that no reader takes where a row ends inside a group, whatever its server."""
STACKS = ("vllm", "sglang", "transformers")
"""Engines that load gpt-oss's experts as one stack a layer alone, in bf16 or in MXFP4."""
MXFP4 = "mxfp4"
"""Dialect of such stacks. Its loaders share groups out unevenly and pad: any cut will do."""
_INT4 = ("int4", "int4_asym")
ANY = "any"
"""Value of :attr:`Fact.inputs` for any inputs."""
EXPERTS, EVERYWHERE = "experts", "all"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Weights that ``engines`` do not serve in ``dialect``.

    Attributes:
        engines: Engines that it is true of.
        dialect: Dialect of the export.
        weights: Formats of the weights.
        inputs: Format of their inputs: a name, None for weight-only, or ``ANY``.
        where: ``EXPERTS``, or ``EVERYWHERE``.
        reason: Why they do not, for the message.
        instead: The nearest that works.
    """

    engines: tuple[str, ...]
    dialect: str
    weights: tuple[str, ...]
    inputs: str | None
    where: str
    reason: str
    instead: str


FACTS = (
    Fact(
        engines=("vllm", "sglang"),
        dialect="modelopt",
        weights=_INT4,
        inputs=None,
        where=EVERYWHERE,
        reason="W4A16_AWQ is read by TensorRT-LLM alone",
        instead="--export-format compressed-tensors, or --serve-engine tensorrt-llm",
    ),
    Fact(
        engines=("vllm", "sglang"),
        dialect="modelopt",
        weights=_INT4,
        inputs="fp8",
        where=EVERYWHERE,
        reason="W4A8_AWQ is read by TensorRT-LLM alone",
        instead="--serve-engine tensorrt-llm, or w4a8_dynamic with --export-format "
        "compressed-tensors",
    ),
    Fact(
        engines=("tensorrt-llm",),
        dialect="modelopt",
        weights=("mxfp8",),
        inputs=ANY,
        where=EVERYWHERE,
        reason="it has no quant_algo MXFP8",
        instead="the recipe fp8_block, or --serve-engine vllm",
    ),
    Fact(
        engines=("tensorrt-llm",),
        dialect="modelopt",
        weights=("nvfp4",),
        inputs=None,
        where=EVERYWHERE,
        reason="it has no quant_algo W4A16_NVFP4",
        instead="the recipe nvfp4, or --serve-engine vllm",
    ),
    Fact(
        engines=("vllm",),
        dialect="compressed-tensors",
        weights=("fp8", "fp8_channel"),
        inputs=None,
        where=EXPERTS,
        reason="FP8 experts need quantized inputs there",
        instead="inputs of the same format as the weights",
    ),
    Fact(
        engines=("vllm",),
        dialect="compressed-tensors",
        weights=_INT4,
        inputs="fp8",
        where=EVERYWHERE,
        reason="INT4 weights run with dynamic FP8 inputs only, and these are static",
        instead="the recipe w4a8_dynamic, or --export-format modelopt for TensorRT-LLM",
    ),
    Fact(
        engines=("transformers",),
        dialect="compressed-tensors",
        weights=("int4_asym",),
        inputs=ANY,
        where=EVERYWHERE,
        reason="zero points fail to load unless CompressedTensorsConfig(dequantize=True) is given",
        instead="the recipe int4, or --serve-engine vllm",
    ),
    Fact(
        engines=("transformers",),
        dialect="compressed-tensors",
        weights=("fp8_block",),
        inputs=ANY,
        where=EXPERTS,
        reason="block FP8 experts are not converted",
        instead="--export-format fp8",
    ),
    Fact(
        engines=("transformers",),
        dialect="compressed-tensors",
        weights=("int8",),
        inputs=ANY,
        where=EXPERTS,
        reason="INT8 experts are not converted",
        instead="the recipe fp8_channel or int8_group, or --serve-engine vllm",
    ),
    Fact(
        engines=("transformers",),
        dialect="compressed-tensors",
        weights=("nvfp4",),
        inputs=ANY,
        where=EXPERTS,
        reason="NVFP4 experts load without an error but their global scales are ignored",
        instead="the recipe mxfp4, or --serve-engine vllm",
    ),
    Fact(
        engines=("vllm",),
        dialect="gptq",
        weights=("int4_asym",),
        inputs=ANY,
        where=EVERYWHERE,
        reason="sym=false is refused there",
        instead="--export-format awq or compressed-tensors",
    ),
)
