"""Checks that must hold on any device: tests/gpu runs them on a GPU, tests/dist on the CPU.

A check raises AssertionError. ``device`` is where the layer under test lives; the reference is
computed on the CPU from the same weights. Import it after ``tests.host.ready()``.
"""

from collections.abc import Sequence

import torch
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from megatron_quant.cpu.gemm import te_general_grouped_gemm
from megatron_quant.formats import (
    Format,
    amax,
    decode,
    encode,
    fake_quant,
    get_format,
    stack_amax,
    tensor_scale,
)
from tests.dist import grouped

FORMATS = {"fp8": get_format("fp8"), "nvfp4": get_format("nvfp4"), "int4": get_format("int4", 32)}
SPLITS = {"uneven": (5, 0, 16, 11), "none": (0, 0, 0, 0), "one expert": (0, 32, 0, 0)}
# ModelOpt's words for the two formats that its fake quant has too.
_MODELOPT = {
    "fp8": {"num_bits": (4, 3)},
    "nvfp4": {
        "num_bits": (2, 1),
        "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    },
}


def layer_computes_as_the_kernels(
    device: str, kind: str, splits: Sequence[int], fmt: Format | None, axis: int | None
) -> None:
    """Outputs and both gradients of a bf16 layer against the CPU room's grouped product."""
    dtype, experts = torch.bfloat16, len(splits)
    if fmt is None:
        layer = grouped.plain(kind, experts, dtype).to(device)
        weights = [getattr(layer, f"weight{i}").detach().cpu() for i in range(experts)]
    else:
        layer = grouped.quantized(kind, experts, fmt, axis, dtype).to(device)
        own = [w.detach().cpu() for w in layer.weights()]
        weights = [w.detach() for w in grouped.fake_quantized(own, fmt, axis)]
    x = grouped.inputs(sum(splits), dtype).detach().to(device).requires_grad_()
    out, _ = layer(x, list(splits))
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out.backward(dy.to(device))
    y, dx, dw = _reference(x.detach().cpu(), weights, dy, splits)
    found = [out, x.grad, *(getattr(layer, f"weight{i}").grad for i in range(experts))]
    for got, want in zip(found, [y, dx, *dw], strict=True):
        assert_equal_to_rounding(got, want, device)


def _reference(
    x: torch.Tensor, weights: Sequence[torch.Tensor], dy: torch.Tensor, splits: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    xs, dys = list(x.split(list(splits))), list(dy.split(list(splits)))
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    dw = [torch.empty_like(w) for w in weights]
    for a, transa, b, transb, outs, single in (
        (weights, True, xs, False, [y], True),
        (weights, False, dys, False, [dx], True),
        (xs, False, dys, True, dw, False),
    ):
        _product(a, transa, b, transb, outs, splits, single)
    return y, dx, dw


def _product(a, transa, b, transb, outs, splits, single) -> None:  # type: ignore[no-untyped-def]
    no_bias, bf16 = [torch.empty(0)] * len(a), 6
    te_general_grouped_gemm(
        *(a, transa, b, transb, outs, bf16, splits, no_bias, bf16, single),
        *([], False, [], 0, False, True),
    )


def assert_equal_to_rounding(got: torch.Tensor, want: torch.Tensor, device: str) -> None:
    """Exactly on the CPU; elsewhere to a unit in bf16's last place, sums having another order."""
    if device == "cpu":
        assert torch.equal(got, want)
        return
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.cpu(), want, rtol=2**-7, atol=1e-4 * largest)


def bytes_are_the_cpus(device: str, fmt: Format, dtype: torch.dtype) -> None:
    """Encoding, decoding and fake quant of a stack, bit for bit."""
    w_ENK = torch.stack([values(96, 128, dtype, seed) * 2.0**seed for seed in range(3)])
    here, there = (_all_of(w.to(d), fmt) for w, d in ((w_ENK, "cpu"), (w_ENK, device)))
    assert here.keys() == there.keys()
    for name, want in here.items():
        assert same_bits(there[name].cpu(), want), name


def _all_of(w_ENK: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    found = {"amax": stack_amax(w_ENK), "amax of all": amax(w_ENK)}
    scale = tensor_scale(found["amax"], fmt) if fmt.tensor_scale else None
    fields = encode(w_ENK, fmt, scale)
    fake = fake_quant(w_ENK, fmt, scale)
    return found | fields | {"decoded": decode(fields, fmt, w_ENK.dtype), "fake": fake}


def packing_is_modelopts(device: str, name: str) -> None:
    """The bytes of a bf16 weight against ModelOpt's own export functions, on the same device."""
    w, fmt = values(96, 128, torch.bfloat16).to(device), FORMATS[name]
    scale = tensor_scale(amax(w), fmt)
    ours = list(encode(w, fmt, scale).values())
    if name == "fp8":
        theirs = [to_quantized_weight(w, scale, "fp8")]
    else:
        block_scale, _ = NVFP4QTensor.get_weights_scaling_factor(w, 16, scale)
        theirs = [to_quantized_weight(w, block_scale, "nvfp4", scale, 16), block_scale]
    for got, want in zip(ours, theirs, strict=False):
        assert same_bits(got, want)


def fake_quant_is_modelopts(device: str, name: str, dtype: torch.dtype) -> None:
    """Fake-quantized values against ModelOpt's own kernels on the same device.

    ModelOpt's fp8 fake quant of a bf16 weight is not what its export stores (docs/upstream.md):
    fp8 is compared in float32.
    """
    w, fmt = values(96, 128, dtype).to(device), FORMATS[name]
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**_MODELOPT[name])).to(device)
    quantizer.amax = amax(w)
    assert torch.equal(fake_quant(w, fmt, tensor_scale(amax(w), fmt)), quantizer(w))


def fused_accumulation_changes_no_gradient(device: str) -> None:
    """A layer that was built to accumulate into main_grad gives .grad, as one that was not."""
    fmt, gradients = FORMATS["fp8"], []
    for fused in (False, True):
        layer = grouped.plain("column", 4, torch.bfloat16).to(device)
        layer.fuse_wgrad_accumulation = fused
        for weight in layer.parameters():
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        layer = grouped.converted(layer, fmt, None)
        x = grouped.inputs(32, torch.bfloat16).detach().to(device).requires_grad_()
        layer(x, [8, 0, 20, 4])[0].float().square().sum().backward()
        assert not any(w.main_grad.any() for w in layer.weights())
        gradients.append([x.grad, *(w.grad for w in layer.weights())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def values(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)
