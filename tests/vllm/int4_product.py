"""vLLM's INT4 product in torch, for CPUs whose vLLM library has none (those with AVX2 alone).

Loading, fusing and repacking of the weights stay vLLM's own; what is done here is the arithmetic of
its operator ``cpu_gemm_wna16`` (csrc/cpu/cpu_wna16.cpp), and only where the operator is not there.
"""

import torch

_SCHEMA = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, "
    "Tensor? zeros, Tensor? bias, SymInt pack_factor, str isa_hint) -> ()"
)
_ROW_BLOCK = 16
"""Output channels that vLLM keeps together: [N / 16, K, 16 / 8] words of eight codes."""
_library = None


def define_where_missing() -> bool:
    """Whether the operator was not there, and now is this file's."""
    global _library
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return False
    _library = torch.library.Library("_C", "FRAGMENT")
    _library.define(_SCHEMA)
    _library.impl("cpu_gemm_wna16", product, "CPU")
    return True


def product(x_MK, words, out_MN, scales_GN, zeros, bias, pack_factor, isa_hint) -> None:  # type: ignore[no-untyped-def]
    """out = x @ ((codes - zero) * scale) + bias; a zero point of 8 where none is given."""
    groups, columns = scales_GN.shape
    inputs = x_MK.shape[1]
    blocks = words.reshape(columns // _ROW_BLOCK, inputs, _ROW_BLOCK // pack_factor)
    codes_KN = nibbles(blocks).permute(1, 0, 2).reshape(inputs, columns)
    zeros_GN = 8 if zeros is None else nibbles(zeros)
    values = (codes_KN.view(groups, -1, columns) - spread(zeros_GN)) * spread(scales_GN.float())
    found = x_MK.float() @ values.view(inputs, columns)
    out_MN.copy_(found if bias is None else found + bias.float())


def spread(of_groups):  # type: ignore[no-untyped-def]
    """[G, N] -> [G, 1, N]; a number stays one."""
    return of_groups.unsqueeze(1) if isinstance(of_groups, torch.Tensor) else of_groups


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., W] -> its codes 0..15, the lowest bits first, [..., 8 W]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2)
