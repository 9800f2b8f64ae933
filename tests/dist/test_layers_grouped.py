"""The quantized grouped linears alone: values, gradients, and state after a forward."""

import pytest
import torch

from megatron_quant.errors import CalibrationError, LayoutError, QuantError
from megatron_quant.formats import get_format
from tests.dist.pool import Ranks

FORMATS = {"fp8": (None,), "nvfp4": (None,), "int4": (32,)}
SPLITS = (5, 0, 16, 11)  # one expert has no token


def _values_and_gradients(name: str, axis: int | None, kind: str, dtype: torch.dtype) -> None:
    from tests.dist import grouped, tiny

    tiny.start()
    fmt = get_format(name, *FORMATS[name])
    layer = grouped.quantized(kind, len(SPLITS), fmt, axis, dtype)
    x = grouped.inputs(sum(SPLITS), dtype)
    ours = list(layer.parameters())
    out, bias = layer(x, list(SPLITS))
    assert bias is None
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out.backward(dy)

    leaves = [w.detach().clone().requires_grad_() for w in layer.weights()]
    y = x.detach().clone().requires_grad_()
    want = grouped.expected(y, grouped.fake_quantized(leaves, fmt, axis), SPLITS)
    want.backward(dy)
    assert torch.equal(out, want)
    assert not torch.equal(out, grouped.expected(y, leaves, SPLITS)), "nothing was quantized"
    assert torch.equal(x.grad, y.grad)
    for weight, leaf in zip(layer.weights(), leaves, strict=True):
        assert torch.equal(weight.grad, leaf.grad)
    assert all(a is b for a, b in zip(ours, layer.parameters(), strict=True))
    assert [n for n, _ in layer.named_parameters()] == [f"weight{i}" for i in range(len(SPLITS))]


def _all_values_and_gradients() -> None:
    for name in FORMATS:
        for axis in (None, 0):
            for kind in ("column", "row"):
                _values_and_gradients(name, axis, kind, torch.float32)
    _values_and_gradients("fp8", 0, "column", torch.bfloat16)
    _values_and_gradients("nvfp4", None, "row", torch.bfloat16)


def _quantized_inputs(name: str) -> None:
    from megatron_quant.formats import amax, fake_quant, tensor_scale
    from tests.dist import grouped, tiny

    tiny.start()
    fmt = get_format(name)
    layer = grouped.quantized("column", len(SPLITS), fmt, None)
    x = grouped.inputs(sum(SPLITS))
    grouped.quantize_inputs(layer, fmt, x)
    out, _ = layer(x, list(SPLITS))
    out.sum().backward()
    y = x.detach().clone().requires_grad_()
    leaves = [w.detach().clone().requires_grad_() for w in layer.weights()]
    seen = fake_quant(y, fmt, tensor_scale(amax(y), fmt))
    want = grouped.expected(seen, grouped.fake_quantized(leaves, fmt, None), SPLITS)
    want.sum().backward()
    assert torch.equal(out, want)
    assert torch.equal(x.grad, y.grad)
    for weight, leaf in zip(layer.weights(), leaves, strict=True):
        assert torch.equal(weight.grad, leaf.grad)


def _no_tokens_at_all() -> None:
    from tests.dist import grouped, tiny

    tiny.start()
    fmt = get_format("fp8")
    layer = grouped.quantized("column", 2, fmt, 0)
    grouped.quantize_inputs(layer, fmt, torch.ones(1))
    x = torch.empty(0, grouped.K, requires_grad=True)
    out, _ = layer(x, [0, 0])
    assert out.shape == (0, grouped.N)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not w.grad.any() for w in layer.weights())


def _recomputed() -> None:
    from torch.utils.checkpoint import checkpoint

    from tests.dist import grouped, tiny

    tiny.start()
    layer = grouped.quantized("row", len(SPLITS), get_format("nvfp4"), 0)
    gradients = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=True)):
        x = grouped.inputs(sum(SPLITS))
        run(x, list(SPLITS))[0].square().sum().backward()
        gradients.append([x.grad, *(w.grad for w in layer.weights())])
        layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _restored_after_an_exception() -> None:
    from tests.dist import grouped, tiny

    tiny.start()
    layer = grouped.quantized("column", len(SPLITS), get_format("fp8"), None)
    before = list(layer.parameters())
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        layer(torch.randn(4, grouped.K + 1), [4, 0, 0, 0])
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))
    assert all(isinstance(w, torch.nn.Parameter) for w in layer.weights())


def _switched_off_and_folded() -> None:
    from modelopt.torch.quantization import fold_weight

    from tests.dist import grouped, tiny

    tiny.start()
    for axis in (None, 0):
        layer = grouped.quantized("column", len(SPLITS), get_format("nvfp4"), axis)
        plain = grouped.plain("column", len(SPLITS))
        x = grouped.inputs(sum(SPLITS)).detach()
        quantized, _ = layer(x, list(SPLITS))
        layer.weight_quantizer.disable()
        assert torch.equal(layer(x, list(SPLITS))[0], plain(x, list(SPLITS))[0])
        layer.weight_quantizer.enable()
        fold_weight(layer)
        assert not layer.weight_quantizer.is_enabled
        assert layer.weight_quantizer.amax is None
        assert torch.equal(layer(x, list(SPLITS))[0], quantized)
        layer = grouped.quantized("column", len(SPLITS), get_format("nvfp4"), axis)
        fold_weight(layer, keep_attrs=True)
        assert layer.weight_quantizer.amax.numel() == (1 if axis is None else len(SPLITS))


def _quantizer_calls() -> dict[tuple[int, int | None], tuple[int, int]]:
    """(experts, axis) -> quantizers called, and codecs run, in one forward."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    from tests.dist import grouped, tiny

    tiny.start()
    calls = []
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: calls.append(1) if isinstance(module, TensorQuantizer) else None
    )
    counts = {}
    for experts in (2, 64):
        for axis in (None, 0):
            layer = grouped.quantized("column", experts, get_format("fp8"), axis)
            x = grouped.inputs(experts).detach()
            grouped.quantize_inputs(layer, get_format("fp8"), x)
            calls.clear()
            with torch.profiler.profile() as profile:
                layer(x, [1] * experts)
            names = [e.name for e in profile.events() if e.name == "_StraightThrough"]
            counts[experts, axis] = (len(calls), len(names))
    return counts


def _convert_without_experts() -> None:
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    from tests.dist import grouped, tiny

    tiny.start()
    layer = grouped.plain("column", 1)
    layer.num_gemms = 0
    QuantModuleRegistry.convert(layer)


def _convert_with_delayed_gradients() -> None:
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    from tests.dist import grouped, tiny

    tiny.start()
    config = tiny.config(2)
    config.delay_wgrad_compute = True
    layer = grouped.plain("row", 2, config=config)
    QuantModuleRegistry.convert(layer)


def _fused_accumulation_is_off() -> None:
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    from tests.dist import grouped, tiny

    tiny.start()
    layer = grouped.plain("column", 2)
    layer.fuse_wgrad_accumulation = True
    layer = QuantModuleRegistry.convert(layer)
    layer.input_quantizer.disable()
    layer.weight_quantizer.disable()
    layer(grouped.inputs(4), [2, 2])[0].sum().backward()
    assert all(w.grad is not None for w in layer.weights())


def _forward_before_calibration() -> None:
    from tests.dist import grouped, tiny

    tiny.start()
    layer = grouped.quantized("column", 2, get_format("fp8"), None)
    layer.weight_quantizer.reset_amax()
    layer(grouped.inputs(4), [2, 2])


def test_values_and_gradients_equal_a_reference_written_out(ranks: Ranks) -> None:
    ranks(1, _all_values_and_gradients)


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_inputs_are_quantized_straight_through(ranks: Ranks, name: str) -> None:
    ranks(1, _quantized_inputs, name)


@pytest.mark.parametrize(
    "check",
    [
        _no_tokens_at_all,
        _recomputed,
        _restored_after_an_exception,
        _switched_off_and_folded,
        _fused_accumulation_is_off,
    ],
)
def test_a_layer(ranks: Ranks, check: object) -> None:
    ranks(1, check)


def test_python_calls_do_not_grow_with_the_experts(ranks: Ranks) -> None:
    (calls,) = ranks(1, _quantizer_calls)
    # Quantizers: weights, inputs, and the output's, which is off.
    assert set(calls.values()) == {(3, 2)}


def test_refusals(ranks: Ranks) -> None:
    for check, kind, message in (
        (_convert_without_experts, LayoutError, "num_gemms=0 holds no expert: lower --ep"),
        (_convert_with_delayed_gradients, QuantError, "delay_wgrad_compute=True"),
        (_forward_before_calibration, CalibrationError, "a fp8 quantizer was used before it had"),
    ):
        (error,) = ranks.errors(1, check)
        assert isinstance(error, kind), error
        assert message in str(error)


def _share_of_a_weight() -> None:
    import copy

    from megatron_quant.formats import grids, whole_matrix
    from megatron_quant.layers.backend import KeptGrid, grid_of, regions_of, set_grid, set_regions
    from tests.dist import grouped, tiny

    tiny.start()
    fmt = get_format("nvfp4")
    layer = grouped.quantized("column", 2, fmt, None)
    quantizer = layer.weight_quantizer
    keys, saved = set(layer.state_dict()), quantizer.get_modelopt_state().keys()
    regions = tuple(grids((whole_matrix(grouped.N, grouped.K),), fmt))
    assert regions_of(quantizer) == () and grid_of(quantizer) is None
    set_regions(quantizer, regions)
    grid = KeptGrid(fmt, regions, ({},))
    set_grid(quantizer, grid)
    assert regions_of(quantizer) == regions and grid_of(quantizer) is grid
    assert set(layer.state_dict()) == keys and quantizer.get_modelopt_state().keys() == saved
    assert quantizer._quantizer_cache is None, "ModelOpt may use its cache as it likes"
    copied = copy.deepcopy(quantizer)
    assert regions_of(copied) == regions and grid_of(copied) == grid
    set_regions(copied, ())
    assert grid_of(copied) is None and grid_of(quantizer) is grid


def test_a_quantizer_keeps_what_its_weight_holds_in_no_state(ranks: Ranks) -> None:
    ranks(1, _share_of_a_weight)
