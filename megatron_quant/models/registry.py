"""The architectures that have a table."""

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
    if isinstance(names, list) and any(str(name).startswith(_DELTA_NETS) for name in names):
        raise ArchitectureError(
            f"architectures={shown(names)} in config.json has gated delta nets, and no table here "
            "describes them without experts; pass --stream, which needs no table"
        )
    raise ArchitectureError(
        f"architectures={shown(names)} in config.json is not known; use a model of "
        f"{', '.join(ARCHITECTURES)}, or pass --stream, which needs no table"
    )
