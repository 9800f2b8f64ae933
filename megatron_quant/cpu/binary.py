"""Import Transformer Engine's Python package without its shared libraries.

The package asks for two of them: the core library, which ``transformer_engine.common`` opens while
it is imported, and the pybind module ``transformer_engine_torch``. The first is skipped by the
package's own switch for its build (``NVTE_PROJECT_BUILDING``), the second is stood in for by a
module with the same enums, the kernels of :mod:`megatron_quant.cpu.kernels`, and a function that
raises for every other name. An installation with the libraries is imported the same way.
"""

import enum
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_quant.cpu import kernels, versions
from megatron_quant.errors import HostError

_STAND_IN = "transformer_engine_torch"
_BUILDING = "NVTE_PROJECT_BUILDING"

# Members count up from 0, as in the enums of transformer_engine.h and its pybind module.
_COUNTED = {
    "CommOverlapType": "RS AG",
    "FP8BwdTensors": ("GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"),
    "FP8FwdTensors": (
        "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT"
        " GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT"
    ),
    "NVTEQBHistogramMode": "TWO_KERNEL FUSED_ATOMIC",
    "NVTERoutingMapFormat": "BYTEMAP BITMAP_U8",
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": (
        "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK"
        " NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK"
    ),
    "NVTE_QKV_Format": (
        "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD"
        " NVTE_THD_2SBHD NVTE_BHSD NVTE_QKV_Format_NOT_SET"
    ),
    "NVTE_QKV_Layout": (
        "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD"
        " NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D"
        " NVTE_THD_T2HD NVTE_THD_TH2D NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD"
        " NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD"
        " NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD"
        " NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD"
        " NVTE_QKV_Layout_NOT_SET"
    ),
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
}
_NUMBERED = {
    "DType": {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
    "NVTEScalingMode": {
        "NVTE_DELAYED_TENSOR_SCALING": 0,
        "NVTE_MXFP8_1D_SCALING": 1,
        "NVTE_BLOCK_SCALING_1D": 2,
        "NVTE_BLOCK_SCALING_2D": 3,
        "NVTE_NVFP4_1D_SCALING": 4,
        "NVTE_INVALID_SCALING": 100,
    },
    "NVTE_Fused_Attn_Backend": {
        "NVTE_F16_arbitrary_seqlen": 1,
        "NVTE_FP8": 2,
        "NVTE_No_Backend": -1,
    },
}
# Transformer Engine looks for these two only to let an outside module replace its attention.
_OPTIONAL = ("flash_attention", "get_attention_backend")


def load(version: str) -> None:
    """Import ``transformer_engine.pytorch`` of ``version`` with the stand-in for its binary part.

    Raises:
        HostError: something that the package imports is missing (einops, onnxscript, triton).
    """
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.submodule_search_locations is not None
    sys.modules[_STAND_IN] = _stand_in(version)
    try:
        common = _import_common(list(spec.submodule_search_locations))
        package = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as e:
        raise HostError(
            f"transformer_engine cannot be imported ({e}): pip install megatron-quant[cpu]"
        ) from e
    package.common = common  # type: ignore[attr-defined]


def _import_common(paths: list[str]) -> types.ModuleType:
    """Import ``transformer_engine.common`` before its package, whose ``__init__`` imports all."""
    bare = types.ModuleType("transformer_engine")
    bare.__path__ = paths
    sys.modules["transformer_engine"] = bare
    try:
        with _environment(_BUILDING, "1"):
            common = importlib.import_module("transformer_engine.common")
    finally:
        del sys.modules["transformer_engine"]
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    return common


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _stand_in(version: str) -> types.ModuleType:
    module = types.ModuleType(_STAND_IN)
    for name, members in _COUNTED.items():
        setattr(module, name, enum.IntEnum(name, members, start=0))
    earlier = versions.removed_members(version)
    for name in [*_NUMBERED, *(earlier.keys() - _NUMBERED.keys())]:
        values = earlier.get(name, {}) | _NUMBERED.get(name, {})
        setattr(module, name, enum.IntEnum(name, values))
    vars(module).update(kernels.table(module.NVTE_Fused_Attn_Backend.NVTE_No_Backend, version))
    vars(module)["__getattr__"] = _lacking
    return module


def _lacking(name: str) -> Any:
    """Answer for a name that the stand-in lacks: a bare class, or a raising kernel."""
    if name.startswith("__") or name in _OPTIONAL:
        raise AttributeError(name)
    found = type(name, (), {}) if name[0].isupper() else kernels.lacking(name)
    return vars(sys.modules[_STAND_IN]).setdefault(name, found)
