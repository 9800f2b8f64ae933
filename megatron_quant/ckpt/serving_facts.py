"""What engines are known to reject or to misread, by dialect and format.

Found with vLLM 0.32 and transformers 5.23, and in the sources of TensorRT-LLM and SGLang.
What is not known is not refused.
"""

from dataclasses import dataclass

_EVERYTHING = ("modelopt", "compressed-tensors", "gptq", "awq", "auto-round", "fp8")
READS = {
    "vllm": _EVERYTHING,
    "transformers": _EVERYTHING[1:],
    "tensorrt-llm": ("modelopt", "fp8"),
    "sglang": _EVERYTHING,
}
"""Engine -> dialects that it reads."""
ENGINES = tuple(READS)
"""What ``--serve-engine`` may be."""
SHARDED = ("vllm", "sglang", "tensorrt-llm")
"""Engines whose tensor parallelism gives each rank whole groups and blocks."""
STACKED_BIASES = ("vllm", "transformers")
"""Engines that load experts with biases (GPT-OSS) as one stack a layer, and single ones not."""
_INT4 = ("int4", "int4_asym")
ANY = "any"
"""In :attr:`Fact.inputs`: whatever the inputs are."""
EXPERTS, EVERYWHERE = "experts", "all"


@dataclass(frozen=True)
class Fact:
    """What ``engines`` do not do with weights of these formats in ``dialect``.

    inputs: format of their inputs: a name, None for weight-only, or ``ANY``.
    where: ``EXPERTS``, or ``EVERYWHERE``.
    instead: the nearest that works.
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
        ("vllm", "sglang"),
        "modelopt",
        _INT4,
        None,
        EVERYWHERE,
        "W4A16_AWQ is read by TensorRT-LLM alone",
        "--export-format compressed-tensors, or --serve-engine tensorrt-llm",
    ),
    Fact(
        ("vllm", "sglang"),
        "modelopt",
        _INT4,
        "fp8",
        EVERYWHERE,
        "W4A8_AWQ is read by TensorRT-LLM alone",
        "--serve-engine tensorrt-llm, or w4a8_dynamic with --export-format compressed-tensors",
    ),
    Fact(
        ("tensorrt-llm",),
        "modelopt",
        ("mxfp8",),
        ANY,
        EVERYWHERE,
        "it has no quant_algo MXFP8",
        "the recipe fp8_block, or --serve-engine vllm",
    ),
    Fact(
        ("tensorrt-llm",),
        "modelopt",
        ("nvfp4",),
        None,
        EVERYWHERE,
        "it has no quant_algo W4A16_NVFP4",
        "the recipe nvfp4, or --serve-engine vllm",
    ),
    Fact(
        ("vllm",),
        "compressed-tensors",
        ("fp8", "fp8_channel"),
        None,
        EXPERTS,
        "FP8 experts need quantized inputs there",
        "inputs of the same format as the weights",
    ),
    Fact(
        ("vllm",),
        "compressed-tensors",
        _INT4,
        "fp8",
        EVERYWHERE,
        "INT4 weights run with dynamic FP8 inputs only, and these are static",
        "the recipe w4a8_dynamic, or --export-format modelopt for TensorRT-LLM",
    ),
    Fact(
        ("transformers",),
        "compressed-tensors",
        ("int4_asym",),
        ANY,
        EVERYWHERE,
        "zero points fail to load unless CompressedTensorsConfig(dequantize=True) is given",
        "the recipe int4, or --serve-engine vllm",
    ),
    Fact(
        ("transformers",),
        "compressed-tensors",
        ("fp8_block",),
        ANY,
        EXPERTS,
        "block FP8 experts are not converted",
        "--export-format fp8",
    ),
    Fact(
        ("transformers",),
        "compressed-tensors",
        ("int8",),
        ANY,
        EXPERTS,
        "INT8 experts are not converted",
        "the recipe fp8_channel or int8_group, or --serve-engine vllm",
    ),
    Fact(
        ("transformers",),
        "compressed-tensors",
        ("nvfp4",),
        ANY,
        EXPERTS,
        "NVFP4 experts load without an error but their global scales are ignored",
        "the recipe mxfp4, or --serve-engine vllm",
    ),
    Fact(
        ("vllm",),
        "gptq",
        ("int4_asym",),
        ANY,
        EVERYWHERE,
        "sym=false is refused there",
        "--export-format awq or compressed-tensors",
    ),
)
