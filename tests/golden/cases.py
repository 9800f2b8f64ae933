"""Inputs of the golden files: those that all formats share, and those of some formats."""

import torch
from torch import Tensor

Case = tuple[Tensor, Tensor | None]
"""An input, and the tensor's scale where it is given (None: from the input's amax)."""
Cases = dict[str, Case]

BF16_MAX = torch.finfo(torch.bfloat16).max
E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def shared_cases() -> Cases:
    """Inputs that make sense for every format."""
    gen = torch.Generator().manual_seed(7)
    normal = torch.randn(6, 128, generator=gen) * 0.02
    exponents = torch.empty(4, 128).uniform_(-30, 2, generator=gen).exp2()
    wide = exponents * torch.randn(4, 128, generator=gen).sign()
    holes = normal[:4].clone()
    holes[0], holes[1, :64], holes[2, 16:32], holes[3, ::2] = 0, 0, 0, 0
    subnormal = torch.randint(-127, 128, (2, 128), generator=gen) * 2.0**-133
    signed_zero = normal[:2].clone()
    signed_zero[0, ::3], signed_zero[1, ::5], signed_zero[1, 1::5] = -0.0, -1e-30, 1e-30
    huge = torch.full((2, 128), BF16_MAX)
    huge[0, ::2], huge[1, ::3], huge[1, 1::3] = -BF16_MAX, 1.0, -BF16_MAX / 2
    return {
        "random_bf16": (normal.bfloat16(), None),
        "random_fp16": (normal[:3].half(), None),
        "random_fp32": (normal[:3].clone(), None),
        "wide_bf16": (wide.bfloat16(), None),
        "wide_fp32": (wide.clone(), None),
        "holes_bf16": (holes.bfloat16(), None),
        "holes_fp32": (holes, None),
        "zero_bf16": (torch.zeros(2, 128, dtype=torch.bfloat16), torch.tensor(1.0)),
        "subnormal_bf16": (subnormal.bfloat16(), None),
        "signed_zero_bf16": (signed_zero.bfloat16(), None),
        "huge_bf16": (huge.bfloat16(), None),
        "single_bf16": (normal[:1, :128].bfloat16(), None),
    }


def around(ties: Tensor) -> Tensor:
    """Each tie and its bf16 neighbours, both signs."""
    up = (ties.bfloat16().view(torch.int16) + 1).view(torch.bfloat16)
    down = (ties.bfloat16().view(torch.int16) - 1).view(torch.bfloat16)
    one_sign = torch.cat([ties.bfloat16(), up, down])
    return torch.cat([one_sign, -one_sign])


def e4m3_ties() -> Tensor:
    """bf16 [1, 756]."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return around((values[1:] + values[:-1]) / 2).view(1, -1)


def e2m1_ties(block: int) -> Tensor:
    """bf16 [6, block], every row with a 6 in it."""
    rows = [[6.0, *row] for row in around(torch.tensor(E2M1_TIES)).view(-1, 7).tolist()]
    return torch.tensor([[*row, *[0.0] * (block - len(row))] for row in rows]).bfloat16()


def fp8_cases() -> Cases:
    beyond = torch.tensor([448.0, 464, 480, 1e4, BF16_MAX, -448, -500, -BF16_MAX]).bfloat16()
    return {
        "ties_bf16": (e4m3_ties(), torch.tensor(1.0)),
        "ties_fp32": (e4m3_ties().float(), torch.tensor(1.0)),
        "beyond_bf16": (beyond.view(1, -1), torch.tensor(1.0)),
        "odd_k_bf16": (odd_k(), None),
    }


def odd_k() -> Tensor:
    return torch.linspace(-1, 1, 3 * 7).view(3, 7).bfloat16()


def nvfp4_cases() -> Cases:
    steep = torch.logspace(-14, 3, 8, 2).repeat_interleave(16).view(1, -1) * torch.ones(2, 1)
    return {
        "ties_bf16": (e2m1_ties(16), torch.tensor(1.0)),
        "ties_fp32": (e2m1_ties(16).float(), torch.tensor(1.0)),
        "block_scale_below_min_bf16": (steep.bfloat16(), None),
        "block_scale_above_max_bf16": (steep.bfloat16(), torch.tensor(1e-3)),
        "one_block_bf16": (torch.linspace(-3, 1, 16).view(1, 16).bfloat16(), None),
    }


def nvfp4_static_cases() -> Cases:
    normal = torch.randn(4, 128, generator=torch.Generator().manual_seed(16)) * 0.02
    return {
        "searched_bf16": (normal.bfloat16(), None),
        "searched_fp32": (normal[:2].clone(), None),
        "four_over_six_bf16": (normal.bfloat16(), None),
    }


def int4_cases() -> Cases:
    ties = torch.arange(-7.5, 8, 0.5).repeat(5)[:128]
    ties[0] = 7.5
    tail = torch.randn(2, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    return {"ties_bf16": (ties.view(1, -1).bfloat16(), None), "group32_bf16": (tail, None)}


def fp8_channel_cases() -> Cases:
    ties = torch.cat([torch.tensor([[448.0]]), e4m3_ties().float()], 1)
    return {
        "ties_bf16": (ties.bfloat16(), None),
        "ties_fp32": (ties * 3.0, None),
        "odd_k_bf16": (odd_k(), None),
        "one_column_bf16": (odd_k().view(-1, 1), None),
    }


def fp8_block_cases() -> Cases:
    gen = torch.Generator().manual_seed(11)
    step = torch.logspace(-6, 5, 130, 2).view(-1, 1)
    return {
        "tall_bf16": ((torch.randn(130, 12, generator=gen) * step).bfloat16(), None),
        "broad_bf16": (torch.randn(3, 144, generator=gen).bfloat16(), None),
        "broad_fp32": (torch.randn(2, 257, generator=gen), None),
    }


def fp8_group_cases() -> Cases:
    gen = torch.Generator().manual_seed(12)
    return {"two_groups_bf16": (torch.randn(3, 256, generator=gen).bfloat16(), None)}


def int8_cases() -> Cases:
    ties = torch.arange(-127.5, 128, 0.5)
    return {
        "ties_bf16": (ties.view(1, -1).bfloat16(), None),
        "ties_fp32": (ties.view(1, -1), None),
        "odd_k_bf16": (odd_k(), None),
    }


def int8_tensor_cases() -> Cases:
    beyond = torch.tensor([[127.5, 128, 1e4, BF16_MAX, -128, -128.5, -129, -BF16_MAX]])
    given = torch.tensor(1.0)
    ties = {name: (w, given) for name, (w, _) in int8_cases().items() if name != "odd_k_bf16"}
    return {**ties, "beyond_bf16": (beyond.bfloat16(), given)}


def int4_asym_cases() -> Cases:
    gen = torch.Generator().manual_seed(13)
    skewed = torch.randn(4, 128, generator=gen) * 0.02 + torch.tensor([[0.03], [-0.03], [1], [-1]])
    ties = torch.arange(-7.5, 8, 0.5).repeat(5)[:128]
    ties[0] = 7.5
    return {
        "ties_bf16": (ties.view(1, -1).bfloat16(), None),
        "skewed_bf16": (skewed.bfloat16(), None),
        "skewed_fp32": (skewed, None),
        "group32_bf16": (skewed[:2].bfloat16(), None),
        "group64_bf16": (skewed[:2].bfloat16(), None),
        "channel_bf16": (torch.cat([skewed, skewed[:, :40]], 1)[:2].bfloat16(), None),
    }


def int8_group_cases() -> Cases:
    gen = torch.Generator().manual_seed(14)
    normal = torch.randn(2, 168, generator=gen).bfloat16()
    return {
        "ties_bf16": (torch.arange(-127.5, 0, 0.5)[:128].view(1, -1).bfloat16(), None),
        "group32_bf16": (normal[:, :128].contiguous(), None),
        "group64_bf16": (normal[:, :128].contiguous(), None),
        "channel_bf16": (normal, None),
    }


def mx_cases() -> Cases:
    """Amaxes at, below and above each power of two and each mantissa at which a rule turns."""
    turns = torch.tensor([1.0, 1.5, 1.75, 7 / 8, 3.5])
    amaxes = around(turns).abs().float().unique()
    rows = amaxes.view(-1, 1) * torch.logspace(0, -5, 32, 2)
    return {"turns_bf16": (rows.bfloat16(), None), "turns_fp32": (rows[::3].contiguous(), None)}


def mxfp8_cases() -> Cases:
    ties = torch.cat([torch.tensor([[448.0]]), e4m3_ties().float()], 1)[:, :736]
    ties = torch.cat([ties.view(-1, 32)[:, :31], torch.full((23, 1), 448.0)], 1)
    return {**mx_cases(), "ties_bf16": (ties.bfloat16(), None)}


def mxfp4_cases() -> Cases:
    return {**mx_cases(), "ties_bf16": (e2m1_ties(32), None)}
