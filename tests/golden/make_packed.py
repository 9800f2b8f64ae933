"""Golden values of packed weights, as GPTQModel, AutoRound and AutoAWQ decode them.

Run from the repository's root with gptqmodel 7.7.0 and autoawq 0.2.9 (sources unpacked) and
auto-round 0.16.1 (wheel unpacked) on PYTHONPATH, with pypcre, device-smi, tokenicer, logbar,
defuser, threadpoolctl and py-cpuinfo (the tests read only the file):

    python -m tests.golden.make_packed

``packed.safetensors`` has, for each case, random tensors as they are stored (``<case>.qweight``,
``.qzeros``, ``.scales``, ``.g_idx``) and ``<case>.weight``, what the tool makes of them: [K, N] in
the dtype of the scales.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

_ABSENT = ("torchao", "pyarrow", "PIL", "torchvision", "datasets")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Dependencies of loading and calibrating models, which decoding does not touch."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(__path__=[], __spec__=spec, __name__=spec.name)
        return module  # type: ignore[return-value]

    def exec_module(self, module: ModuleType) -> None:
        pass


# ruff: noqa: E402
import torch
import transformers.modeling_utils  # noqa: F401  (before anything seems to be there)

sys.meta_path.append(_Absent())

from auto_round.export.export_to_awq.utils import dequantize_gemm as auto_round_awq
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as AutoRoundLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import save_file
from torch import Tensor

ROWS, COLS = 32, 224
Tensors = dict[str, Tensor]
GEN = torch.Generator().manual_seed(12)


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=GEN).to(torch.int32)


def scales(groups: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.rand(groups, ROWS, generator=GEN)
    return drawn.add_(0.5).mul_(2**-6).to(dtype)


def packed_zeros(groups: int, bits: int, low: int, high: int) -> Tensor:
    """Codes ``low`` .. ``high``, of which a word holds those of several rows."""
    codes = torch.randint(low, high + 1, (groups, ROWS), generator=GEN).to(torch.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes.contiguous().view(torch.int32)


def gptq(version: int, bits: int, group: int, zero: int | None, act_order: bool) -> Tensors:
    """``zero``: what is stored of every zero point; None for random ones."""
    groups = -(-COLS // group) if group > 0 else 1
    # Version 1 stores zero points less one, and none of 0.
    high = 2**bits - (2 if version == 1 else 1)
    low, high = (0, high) if zero is None else (zero, zero)
    index = torch.arange(COLS, dtype=torch.int32) // (group if group > 0 else COLS)
    if act_order:
        index = index[torch.randperm(COLS, generator=GEN)]
    stored = {
        "qweight": words(COLS * bits // 32, ROWS),
        "qzeros": packed_zeros(groups, bits, low, high),
        "scales": scales(groups, torch.float16),
        "g_idx": index.contiguous(),
    }
    module = TorchLinear(bits, group, zero is not None, act_order, COLS, ROWS)
    for name, tensor in stored.items():
        getattr(module, name).copy_(tensor)
    if version == 1:
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    return {**stored, "weight": module.dequantize_weight().detach()}


def auto_round_gptq(bits: int, group: int, zero: int | None) -> Tensors:
    groups = COLS // group
    low, high = (0, 2**bits - 2) if zero is None else (zero, zero)
    module = AutoRoundLinear(bits, group, COLS, ROWS, bias=False)
    stored = {
        "qweight": words(COLS * bits // 32, ROWS),
        "qzeros": packed_zeros(groups, bits, low, high),
        "scales": scales(groups, torch.float16),
    }
    for name, tensor in stored.items():
        getattr(module, name).copy_(tensor)
    module.post_init()
    return {**stored, "weight": module(torch.eye(COLS)).half()}


def awq(decode: Any, group: int, dtype: torch.dtype) -> Tensors:
    groups = COLS // group
    qweight, qzeros = words(COLS, ROWS // 8), words(groups, ROWS // 8)
    scale = scales(groups, dtype)
    weight = decode(qweight, qzeros, scale, 4, group)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scale, "weight": weight}


def auto_awq() -> Any:
    """AutoAWQ's decoder, without the package, which imports models that transformers has not."""
    folder = next(Path(p) / "awq" for p in sys.path if (Path(p) / "awq" / "__init__.py").exists())
    file = folder / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dequantize_gemm


def main() -> None:
    cases = {
        "gptq_v1_sym4": gptq(1, 4, 64, 7, False),
        "gptq_v1_sym4_act_order": gptq(1, 4, 64, 7, True),
        "gptq_v1_asym4_act_order": gptq(1, 4, 64, None, True),
        "gptq_v1_asym4_channel": gptq(1, 4, -1, None, False),
        "gptq_v1_asym8": gptq(1, 8, 32, None, False),
        "gptq_v2_asym4": gptq(2, 4, 64, None, False),
        "gptq_v2_sym8_act_order": gptq(2, 8, 32, 128, True),
        "gptq_v2_asym8_act_order": gptq(2, 8, 128, None, True),
        "auto_gptq_sym4": auto_round_gptq(4, 32, 7),
        "auto_gptq_asym4": auto_round_gptq(4, 32, None),
        "auto_gptq_sym8": auto_round_gptq(8, 32, 127),
        "auto_awq_fp16": awq(auto_round_awq, 32, torch.float16),
        "awq_fp16": awq(auto_awq(), 32, torch.float16),
        "awq_bf16": awq(auto_awq(), 32, torch.bfloat16),
    }
    tensors = {f"{c}.{n}": t.contiguous() for c, case in cases.items() for n, t in case.items()}
    made_by = {"made_by": "gptqmodel 7.7.0, auto-round 0.16.1, autoawq 0.2.9"}
    save_file(tensors, Path(__file__).parent / "packed.safetensors", made_by)


if __name__ == "__main__":
    main()
