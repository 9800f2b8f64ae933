"""Measure quantization on a GPU: codecs against the copy bandwidth, layers against their GEMM.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --experts 8 --rows 256 --cols 256   # only: does it run?

It prints Markdown with the device's name and the versions, for docs/performance_gpu.md. Bytes are
those of the bf16 input. The goals: amax and encode at 70 % of the copy bandwidth; fake quant of all
experts of a layer under 15 % of its grouped product in bf16.
"""

import argparse
from collections.abc import Callable
from importlib import metadata
from typing import Any
from unittest.mock import patch

import torch

from megatron_quant import cpu
from megatron_quant.formats import amax, encode, fake_quant, get_format, stack_amax, tensor_scale
from megatron_quant.formats.backends import gpu

GOALS = {"codec": 70, "layer": 15}


def main() -> None:
    """Measure and print."""
    args = parse()
    if args.device == "cpu":
        cpu.activate()
    torch.manual_seed(0)
    w_ENK = torch.randn(args.experts, args.rows, args.cols, dtype=torch.bfloat16)
    w_ENK = w_ENK.to(args.device)
    print(heading(args))
    print(codecs(w_ENK, args.seconds))
    print(layers(w_ENK, args.tokens, args.seconds))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1536, help="output features of an expert")
    parser.add_argument("--cols", type=int, default=2048, help="input features of an expert")
    parser.add_argument("--tokens", type=int, default=256, help="tokens an expert")
    parser.add_argument("--seconds", type=float, default=1.0, help="measured per figure")
    return parser.parse_args()


def heading(args: argparse.Namespace) -> str:
    """What was measured, on what."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU (a smoke run)"
    names = ("torch", "transformer_engine", "megatron-core", "nvidia-modelopt")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    shape = f"{args.experts} experts of {args.rows} x {args.cols}, {args.tokens} tokens each"
    return f"{device}; {versions}; {shape}\n"


def seconds(run: Callable[[], object], budget: float) -> float:
    """Median time of one call; the timer waits for the device."""
    import torch.utils.benchmark as benchmark

    run()
    timer = benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=budget).median


def codecs(w_ENK: torch.Tensor, budget: float) -> str:
    """A table of amax, encode and fake quant."""
    size = w_ENK.numel() * w_ENK.element_size() / 1e9
    target = torch.empty_like(w_ENK)
    copy = size / seconds(lambda: target.copy_(w_ENK), budget)
    runs: dict[str, Callable[[], object]] = {
        "amax of all": lambda: amax(w_ENK),
        "amax of each expert": lambda: stack_amax(w_ENK),
    }
    for name in ("fp8", "nvfp4", "int4"):
        fmt = get_format(name)
        scale = tensor_scale(stack_amax(w_ENK), fmt) if fmt.tensor_scale else None
        runs[f"encode {name}"] = lambda f=fmt, s=scale: encode(w_ENK, f, s)
        runs[f"fake quant {name}"] = lambda f=fmt, s=scale: fake_quant(w_ENK, f, s)
    head = f"| (goal {GOALS['codec']} %) | GB/s of input | of a copy | in torch alone, GB/s |"
    lines = [head, "|---|---|---|---|", f"| copy | {copy:.1f} | 100 % | |"]
    for name, run in runs.items():
        speed = size / seconds(run, budget)
        with patch.object(gpu, "available", return_value=False):
            plain = size / seconds(run, budget)
        lines.append(f"| {name} | {speed:.1f} | {100 * speed / copy:.0f} % | {plain:.1f} |")
    return "\n".join(lines) + "\n"


def layers(w_ENK: torch.Tensor, tokens: int, budget: float) -> str:
    """A forward of TE's GroupedLinear, what our quantizer adds, and ModelOpt's expert by expert."""
    import transformer_engine.pytorch as te

    from megatron_quant.layers.backend import quantizer_attributes, register_backend

    register_backend()
    experts, rows, cols = w_ENK.shape
    linear = te.GroupedLinear(experts, cols, rows, bias=False, params_dtype=torch.bfloat16)
    linear.to(w_ENK.device)
    x = torch.randn(experts * tokens, cols, dtype=torch.bfloat16, device=w_ENK.device)
    splits = [tokens] * experts
    with torch.no_grad():
        gemm = seconds(lambda: linear(x, splits), budget)
    lines = [
        f"| (goal {GOALS['layer']} %) | ms | of the product |",
        "|---|---|---|",
        row("grouped product, bf16", gemm, gemm),
    ]
    for name in ("fp8", "nvfp4", "int4"):
        ours = quantizer(quantizer_attributes(get_format(name)), w_ENK.flatten(0, 1))
        once = seconds(lambda q=ours: q(w_ENK.flatten(0, 1)), budget)
        lines.append(row(f"{name}, all experts at once", once, gemm))
        if w_ENK.device.type == "cpu" and name == "nvfp4":
            continue  # ModelOpt's kernel takes CUDA tensors alone
        plain = modelopts(name)
        each = [quantizer(plain, w) for w in w_ENK]
        looped = seconds(lambda e=each: [q(w) for q, w in zip(e, w_ENK, strict=True)], budget)
        lines.append(row(f"{name}, ModelOpt expert by expert", looped, gemm))
    return "\n".join(lines) + "\n"


def row(name: str, took: float, gemm: float) -> str:
    """A line of the second table."""
    return f"| {name} | {1e3 * took:.3f} | {100 * took / gemm:.0f} % |"


def quantizer(attributes: dict[str, Any], w_NK: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A ModelOpt TensorQuantizer with these attributes, calibrated on a weight."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    made = TensorQuantizer(QuantizerAttributeConfig(**attributes)).to(w_NK.device)
    made.disable_quant()
    made.enable_calib()
    made(w_NK)
    made.load_calib_amax()
    made.enable_quant()
    made.disable_calib()
    return made


def modelopts(name: str) -> dict[str, Any]:
    """The attributes of the format in ModelOpt's own words, computed by its own kernels."""
    from megatron_quant.layers.backend import quantizer_attributes

    ours = quantizer_attributes(get_format(name))
    if name == "int4":
        ours["block_sizes"] = {-1: get_format(name).group_size}  # its blocks have an amax each
    return {k: v for k, v in ours.items() if not k.startswith("backend")}


if __name__ == "__main__":
    main()
