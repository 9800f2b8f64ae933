"""The architectures that have a table."""

from importlib.util import find_spec

from megatron_quant.documents import shown
from megatron_quant.errors import ArchitectureError
from megatron_quant.models.architecture import Architecture
from megatron_quant.models.config import Config
from megatron_quant.models.deepseek_v3 import DEEPSEEK_V3
from megatron_quant.models.dots1 import DOTS1
from megatron_quant.models.glm4_moe import GLM4_MOE, GLM4_MOE_LITE
from megatron_quant.models.gpt_oss import GPT_OSS
from megatron_quant.models.hy_v3 import HY_V3
from megatron_quant.models.kimi_k25 import KIMI_K25
from megatron_quant.models.llama import LLAMA
from megatron_quant.models.mixtral import MIXTRAL
from megatron_quant.models.nemotron_h import NEMOTRON_H
from megatron_quant.models.qwen2_moe import QWEN2_MOE
from megatron_quant.models.qwen3 import QWEN3
from megatron_quant.models.qwen3_moe import QWEN3_MOE
from megatron_quant.models.qwen3_next import QWEN3_5_MOE, QWEN3_5_MOE_VL, QWEN3_NEXT

ARCHITECTURES = {
    a.name: a
    for a in (
        QWEN3_MOE,
        QWEN2_MOE,
        QWEN3_NEXT,
        QWEN3_5_MOE,
        QWEN3_5_MOE_VL,
        MIXTRAL,
        DEEPSEEK_V3,
        KIMI_K25,
        GLM4_MOE,
        GLM4_MOE_LITE,
        DOTS1,
        HY_V3,
        GPT_OSS,
        QWEN3,
        LLAMA,
    )
}

"""Models that this library builds."""

UNBUILT = {NEMOTRON_H.name: (NEMOTRON_H, "mamba_ssm")}
"""Models whose parameters are known by Megatron's names alone, and the package that they need.

Files of theirs are described by names and shapes, as those of models without a table.
"""

_DELTA_NETS = ("Qwen3Next", "Qwen3_5")


def lookup(hf_config: Config) -> Architecture:
    """Return the architecture that ``hf_config`` (config.json's content) names.

    Raises:
        ArchitectureError: Where ``architectures`` names none or an unknown one. The message lists
            the known ones.
    """
    names = hf_config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if isinstance(name, str) and name in UNBUILT:
        return UNBUILT[name][0]
    if isinstance(names, list) and any(str(name).startswith(_DELTA_NETS) for name in names):
        raise ArchitectureError(
            f"architectures={shown(names)} in config.json has gated delta nets, and no table here "
            "describes them without experts; pass --stream, which needs no table"
        )
    raise ArchitectureError(
        f"architectures={shown(names)} in config.json is not known; use a model of "
        f"{', '.join(ARCHITECTURES)}, or pass --stream, which needs no table"
    )


def lookup_live(hf_config: Config) -> Architecture:
    """Return what :func:`lookup` does, of a model that is to run.

    Raises:
        ArchitectureError: As :func:`lookup` does, and where this library does not build the model.
            The message names the package that the model needs, if that is not installed.
    """
    found = lookup(hf_config)
    if found.name not in UNBUILT:
        return found
    _, package = UNBUILT[found.name]
    if find_spec(package) is None:
        raise ArchitectureError(
            f"{found.name} runs in Megatron-Core with the package {package}, which is not "
            "installed, and this library does not build the model yet: pass --stream, which needs "
            "neither"
        )
    raise ArchitectureError(
        f"{found.name} is not built by this library yet, though {package} is installed: pass "
        "--stream, which goes from file to file"
    )
